"""One process of a training that is killed as a plan says: `python chaos_job.py PLAN RECORD passl-train's arguments`.

PLAN is {"rank", "signal", "moment", "count", "whom"} as JSON, or {}: the process of that rank sends the signal to
itself ("me"), its first data worker ("worker") or all processes of the job ("all") when the moment has come for the
count-th time. RECORD gets a line for each step: which samples it saw.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Callable

MOMENTS = ("before a step", "after a step", "before a rename", "after a rename", "while writing", "while loading")


def main() -> None:
    plan, record = json.loads(sys.argv[1]), Path(sys.argv[2])
    rank = int(os.environ["PADDLE_TRAINER_ID"])
    import paddle

    from passl.engine import start
    from passl.engine.hooks import LogHook
    from passl.engine.trainer import Trainer

    seen = dict.fromkeys(MOMENTS, 0)

    def come(moment: str) -> None:
        seen[moment] += 1
        if plan and plan["rank"] == rank and plan["moment"] == moment and plan["count"] == seen[moment]:
            send(getattr(signal, plan["signal"]), plan["whom"])

    def around(owner: object, name: str, before: str = "", after: str = "", note: Callable = lambda *_: None) -> None:
        function = getattr(owner, name)

        def wrapped(*arguments: object, **keywords: object) -> object:
            note(*arguments)
            if before:
                come(before)
            result = function(*arguments, **keywords)
            if after:
                come(after)
            return result

        setattr(owner, name, wrapped)

    def note(trainer: Trainer, batch: dict) -> None:
        indices = [int(index) for index in batch["index"]]
        with record.open("a") as file:
            file.write(json.dumps({"step": trainer.step, "rank": rank, "indices": indices}) + "\n")

    around(Trainer, "train_step", before="before a step", note=note)
    around(LogHook, "after_step", after="after a step")
    around(os, "replace", before="before a rename", after="after a rename")
    around(start, "resume", before="while loading")
    save = paddle.save

    def cut(value: object, path: str, **keywords: object) -> None:
        Path(path).write_bytes(b"half a file")
        come("while writing")
        save(value, path, **keywords)

    paddle.save = cut
    from passl.cli import train_main

    train_main(sys.argv[3:])


def send(number: int, whom: str) -> None:
    if whom == "all":
        os.killpg(0, number)
    elif whom == "worker":
        for worker in children():
            os.kill(worker, number)
            return
    else:
        os.kill(os.getpid(), number)


def children() -> list[int]:
    return [int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


if __name__ == "__main__":
    main()
