"""The bare reference: starlette and one micro-batcher. No checks, no metrics, no limits."""

import asyncio
import os
from concurrent.futures import ThreadPoolExecutor

import uvicorn
from graph import MAX_BATCH, bits_per_dim, decode, open_session
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

session = open_session()
thread = ThreadPoolExecutor(1)
waiting = []
running = set()


async def drain():
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0)  # whoever has arrived joins
    while waiting:
        batch = waiting[:MAX_BATCH]
        del waiting[:MAX_BATCH]
        found = await loop.run_in_executor(thread, bits_per_dim, session, [i for i, _ in batch])
        for (_, future), bits in zip(batch, found, strict=True):
            future.set_result(bits)
    running.clear()


async def score(request):
    future = asyncio.get_running_loop().create_future()
    waiting.append((decode(await request.body()), future))
    if not running:
        running.add(asyncio.create_task(drain()))
    return JSONResponse({"bits_per_dim": await future})


app = Starlette(routes=[Route("/score", score, methods=["POST"])])
uvicorn.run(app, port=int(os.environ["PORT"]), log_level="error", access_log=False)
