// What the panel asks the server. Each failure is an Error with a sentence that says what to do.

import { api } from "../comfy.js";
import { said } from "./said.js";
import { t } from "./text.js";

/**
 * @param {string} path
 * @param {RequestInit} [options]
 * @returns {Promise<Response>}
 */
export async function ask(path, options) {
  let answer;
  try {
    answer = await api.fetchApi(path, options);
  } catch {
    throw new Error(t("error.away", { path }));
  }
  if (answer.ok) return answer;
  const message = await errorIn(answer);
  if (answer.status === 404 && !message) throw new Error(t("error.old", { path }));
  const values = { path, status: answer.status, message: said(message) || "?" };
  throw Object.assign(new Error(t("error.refused", values)), { status: answer.status });
}

async function errorIn(answer) {
  try {
    const { error } = await answer.json();
    return typeof error === "string" ? error : (error?.message ?? "");
  } catch {
    return "";
  }
}

/** @param {string} path @returns {Promise<any>} */
export async function get(path) {
  const answer = await ask(path);
  try {
    return await answer.json();
  } catch {
    throw new Error(t("error.strange", { path }));
  }
}

/** @param {string} path @param {object} body @returns {Promise<any>} */
export async function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  const answer = await ask(path, { method: "POST", headers, body: JSON.stringify(body) });
  return answer.json().catch(() => ({}));
}

/** Let the browser save what `path` answers under the name that the server gives it, or `name`. */
export async function download(path, name) {
  const answer = await ask(path);
  const given = /filename="?([^";]+)"?/.exec(answer.headers.get("Content-Disposition") ?? "")?.[1];
  const address = URL.createObjectURL(await answer.blob());
  const link = document.createElement("a");
  link.href = address;
  link.download = given ?? name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
