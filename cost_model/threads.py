"""The threads of the runtime that a walk follows. Each works its operations off in order.

`MAIN` issues the operations and computes; `CPU` attends; `KV` loads and `STORE` stores KV, `WRITE` writes it to disk;
`ACT` moves hidden states; `ATTENDED` brings up what the CPU attended. `COPY`, `READ` and `STAGE` are the weight stream.
"""

MAIN, CPU, KV, STORE, WRITE, ACT, ATTENDED, COPY, READ, STAGE = range(10)
COUNT = 10
#: Those that get their operations from the main thread.
ERRANDS = (CPU, KV, STORE, WRITE, ACT, ATTENDED)
#: Those of the weight stream, which run ahead of the main thread.
STREAM = (COPY, READ, STAGE)
