"""Print what a ComfyUI server sends to one client, one JSON message a line, until the server or the reader is gone.

<python of .venv> watch.py <http://address:port> <client id>
"""

import asyncio
import json
import sys

import aiohttp


async def watch(url: str, client: str) -> None:
    """Follow the websocket; previews (binary messages) are left out."""
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId={client}") as socket:
        async for message in socket:
            if message.type == aiohttp.WSMsgType.TEXT:
                print(json.dumps(message.json()), flush=True)


if __name__ == "__main__":
    asyncio.run(watch(*sys.argv[1:3]))
