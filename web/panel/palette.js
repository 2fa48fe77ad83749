// The colour of each kernel, the same as in the reports' pictures (measure/palette.py): a family has one hue of the
// palette of Okabe and Ito, whose hues people with colour blindness can tell apart; its members differ in lightness.

/** @type {Record<string, string>} */
export const COLOURS = {
  host: "#8C8C8C",
  sdpa: "#0072B2",
  sdpa_flash: "#56B4E9",
  sdpa_efficient: "#00456B",
  sdpa_cudnn: "#3A8FC7",
  sdpa_math: "#A9D6F5",
  flash2: "#009E73",
  flash3: "#00674B",
  flash4: "#5FCBA8",
  xformers: "#6F5FAE",
  xformers_cutlass: "#B3A8DB",
  sage1: "#F7D58B",
  sage2_fp16_triton: "#F3BD3F",
  sage2_fp16_cuda: "#E69F00",
  sage2_fp8_cuda: "#B87A00",
  sage2_fp8_cuda_pp: "#875A00",
  sage3: "#D55E00",
  sage3_per_block_mean: "#F0935A",
  kitchen_int8: "#CC79A7",
  attune_int8: "#8E3E6C",
  attune_bf16: "#4E1F3B",
  split: "#F0E442",
  sub_quad: "#3D3D3D",
  basic: "#C2C2C2",
};
const OTHERS = ["#5B3A29", "#A0785A", "#2F5D62", "#9AA65B"];

/** CRC-32 of a text's UTF-8, as zlib has it. */
function crc32(text) {
  let sum = 0xffffffff;
  for (const byte of new TextEncoder().encode(text)) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return (sum ^ 0xffffffff) >>> 0;
}

/** The colour of a kernel as "#rrggbb". One that this version does not know gets one by its name. */
export const colour = (/** @type {string} */ kernel) => COLOURS[kernel] ?? OTHERS[crc32(kernel) % OTHERS.length];
