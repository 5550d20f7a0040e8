"""The threads of the runtime that a walk follows. Each works its operations off in order.

`MAIN` issues the operations and computes; `CPU` attends; `KV` loads and `STORE` stores KV, `WRITE` writes it to disk;
`ACT` moves hidden states; `ATTENDED` brings up what the CPU attended. `DEMANDED` reads and `BROUGHT` copies experts on demand.
`COPY`, `READ` and `STAGE` are the weight stream.
"""

MAIN, CPU, KV, STORE, WRITE, ACT, ATTENDED, DEMANDED, BROUGHT, COPY, READ, STAGE = range(12)
COUNT = 12
#: Those that get their operations from the main thread.
ERRANDS = (CPU, KV, STORE, WRITE, ACT, ATTENDED, DEMANDED, BROUGHT)
#: Those of the weight stream, which run ahead of the main thread.
STREAM = (COPY, READ, STAGE)
