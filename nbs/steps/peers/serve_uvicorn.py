"The least that an application of ASGI does under Uvicorn: MODEL PORT hello FOLDER"

import uvicorn
from serve_model import arguments

HEADERS = [(b'content-type', b'application/json')]


async def read_body(receive) -> bytes:
    body = b''
    more = True
    while more:
        event = await receive()
        body += event.get('body', b'')
        more = event.get('more_body', False)
    return body


async def follow_lifespan(receive, send) -> None:
    kind = ''
    while kind != 'lifespan.shutdown':
        kind = (await receive())['type']
        await send({'type': f'{kind}.complete'})


async def app(scope, receive, send):
    if scope['type'] == 'lifespan':
        await follow_lifespan(receive, send)
        return
    await read_body(receive)
    text = b'{"p":0.5}'
    headers = [*HEADERS, (b'content-length', b'%d' % len(text))]
    await send({'type': 'http.response.start', 'status': 200, 'headers': headers})
    await send({'type': 'http.response.body', 'body': text})


_, port, _ = arguments()
uvicorn.run(app, host='127.0.0.1', port=port, log_level='warning', access_log=False)
