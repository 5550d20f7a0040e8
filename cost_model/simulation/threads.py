"""The threads of the runtime that a replay follows. Each works its operations off in order.

`MAIN` issues the operations and computes; `CPU` attends; `KV` loads and `STORE` stores KV, `WRITE` writes it to disk;
`ACT` moves hidden states; `ATTENDED` brings up what the CPU attended. `DEMANDED` reads and `BROUGHT` copies experts on demand.
`COPY`, `READ` and `STAGE` are the weight stream. `BOOKS` is the main thread again, which keeps books of the first half-block when it
has issued all operations: the device still computes.
"""

from cost_model.timing.contention import USERS

MAIN, CPU, KV, STORE, WRITE, ACT, ATTENDED, DEMANDED, BROUGHT, COPY, READ, STAGE, BOOKS = range(13)
COUNT = 13
#: Those that get their operations from the main thread, and who may be waiting for each of them beside that thread.
WAKES = {
    CPU: (ATTENDED,),
    KV: (STORE,),
    STORE: (CPU, WRITE),
    WRITE: (STORE,),
    ACT: (),
    ATTENDED: (),
    DEMANDED: (BROUGHT,),
    BROUGHT: (),
    BOOKS: (),
}
TASK_THREADS = tuple(WAKES)
#: Those of them whose operations go with another one, or with the experts that they bring: the main thread dispatches none.
NOT_DISPATCHED = (ATTENDED, DEMANDED, BROUGHT, BOOKS)
#: Those of the weight stream, which run ahead of the main thread, and who of `Resources` each is.
STREAM_USER = {COPY: "h2d", READ: "disk_read", STAGE: "stage"}
STREAM = tuple(STREAM_USER)
#: The bit of each user of `Resources` in a mask of those who are at work.
USER_BIT = {name: place for place, name in enumerate(USERS)}
