"""Measures the share of held-out shop tasks that astraea-tiny solves, through the engine, with real tools.

python scripts/eval_tiny.py                  500 tasks that training never saw
python scripts/eval_tiny.py --tasks=2000 --seed=7 --show_wrong=10
python scripts/eval_tiny.py --quantize=int8 --kv_dtype=fp8       with 8-bit weights and KV
"""

from __future__ import annotations

import asyncio
from collections import Counter

from absl import flags
from rich.console import Console
from rich.progress import track
from rich.table import Table

from astraea_jax.agents.loop import ProgramResult, run_program
from astraea_jax.agents.tools import tool
from astraea_jax.engine.engine import Engine
from astraea_jax.engine.sampling import SamplingParams
from astraea_jax.errors import StartupError
from astraea_jax.frontends.flags import MODEL, engine_flags, run_main
from astraea_jax.frontends.progress import StartupDisplay
from astraea_jax.lab.shop import Task, make_tasks
from astraea_jax.models.config import CheckpointError

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "astraea-tiny", "Checkpoint folder or bundled name.")
options = engine_flags(*MODEL)
flags.DEFINE_integer("tasks", 500, "Held-out tasks.", lower_bound=1)
flags.DEFINE_integer("seed", 100, "Seed of the tasks; training used 0 and its own evaluation 1.")
flags.DEFINE_integer("show_wrong", 5, "Wrong answers to print.", lower_bound=0)
flags.DEFINE_float("wanted", 0.95, "Share of right answers below which the exit status is 1.")

AT_ONCE = 128
console = Console()


async def run(engine: Engine, tasks: list[Task]) -> list[tuple[Task, ProgramResult]]:
    places = asyncio.Semaphore(AT_ONCE)

    async def one(task: Task) -> tuple[Task, ProgramResult]:
        async with places:
            tools = [tool(function) for function in task.tools()]
            return task, await run_program(engine, task.messages(), tools, params=SamplingParams(max_tokens=96))

    running = [asyncio.create_task(one(task)) for task in tasks]
    return [await task for task in track(running, "tasks", console=console)]


def main(_: list[str]) -> None:
    with StartupDisplay() as display:
        try:
            engine = Engine.from_folder(FLAGS.model, options(), progress=display.loading)
        except (CheckpointError, StartupError) as error:
            raise SystemExit(f"cannot evaluate: {error}") from None
        engine.start(display.compiling)
    done = asyncio.run(run(engine, make_tasks(seed=FLAGS.seed, split="test", count=FLAGS.tasks)))
    engine.shutdown(grace_s=0)
    wrong = [(task, result) for task, result in done if not task.is_right(result.text)]
    total, failed = (Counter(len(task.calls) + 1 for task, _ in some) for some in (done, wrong))
    table = Table(title=f"{FLAGS.model} on {len(done)} held-out tasks")
    for name in ("requests", "tasks", "right"):
        table.add_column(name, justify="right")
    for requests in sorted(total):
        table.add_row(str(requests), str(total[requests]), f"{1 - failed[requests] / total[requests]:.1%}")
    share = 1 - len(wrong) / len(done)
    table.add_row("all", str(len(done)), f"{share:.1%}")
    console.print(table)
    for task, result in wrong[: FLAGS.show_wrong]:
        console.print(f"{task.question!r}: {result.text!r}, should be {task.answer}", markup=False)
    if share < FLAGS.wanted:
        raise SystemExit(f"{share:.1%} are right; at least {FLAGS.wanted:.0%} were wanted")


if __name__ == "__main__":
    run_main(main)
