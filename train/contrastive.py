"""Step 6 of the loop: contrastive training of the encoder on scored examples.

    accelerate launch train/contrastive.py --config FILE --examples DIR --output DIR

writes ``encoder``, ``result.json`` (what ended it: `outcome`), ``log.jsonl`` and ``checkpoints``;
the encoder is the best on held-out examples with ``training.eval_every``. Run again, it goes on
from the last intact checkpoint. SIGTERM, SIGINT, SIGUSR1, ``--stop-file``: it saves and ends.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import yaml
from accelerate import Accelerator

from memshare.config import Config, ConfigError, add_config_arguments, load_config, positive, public
from memshare.files import DiskFull, RunLocked
from memshare.progress import log, track
from memshare.retrieval.card import base_model
from memshare.retrieval.encoder import Encoder
from memshare.retrieval.errors import EncoderError
from memshare.training import checkpoint, outcome, shard, wandb_run
from memshare.training.batching import Batches
from memshare.training.estimate import estimate
from memshare.training.evaluate import read_held_out
from memshare.training.examples import read_training
from memshare.training.export import export
from memshare.training.gather import DifferentData, World, launch, leave
from memshare.training.optimizer import lr_factor, make_optimizer, round_lr, update
from memshare.training.resume import HOW, fixed_settings, resume, without_ruined
from memshare.training.select import select
from memshare.training.sharding import spread
from memshare.training.step import ContrastiveStep
from memshare.training.step_result import LogInterval, StepFailed, memory_told
from memshare.training.towers import FrozenMemories, prepare
from memshare.training.tracking import Tracker, new_run_id
from memshare.training.validation import Validation
from memshare.version import commit

ERRORS = (EncoderError, shard.ExamplesError, checkpoint.CheckpointError, DifferentData, StepFailed)


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description="Contrastive training of the encoder.")
    add_config_arguments(parser)
    parser.add_argument("--examples", type=Path, nargs="+", required=True, metavar="DIR")
    parser.add_argument("--held-out", type=Path, nargs="+", metavar="DIR", help="default: theirs")
    parser.add_argument("--encoder", help="folder or name to start from (default: the config's)")
    parser.add_argument("--warm", metavar="DIR", help="earlier --output: its optimizer")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--round", type=positive, default=1, help="continual round: varies order")
    parser.add_argument(
        "--resume", choices=HOW, nargs="?", const="must", default="auto",
        help="from a checkpoint if there is one (same: with these settings), or fail, or afresh",
    )  # fmt: skip
    parser.add_argument("--allow-config-change", action="store_true", help="resume all the same")
    parser.add_argument("--stop-file", type=Path, metavar="FILE", help="stop once it is there")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train; returns the exit code."""
    args = arguments().parse_args(argv)
    try:
        config = load_config(args.config, args.overrides)
        accelerator = launch(config.encoder.device)
    except ConfigError as error:
        return outcome.tell(error)
    world = World(accelerator.device)
    writes = world.main and not args.dry_run
    try:
        wandb_run.wandb_mode(config.wandb)  # checked before anything starts
        with (
            ExitStack() as at_end,  # W&B, whose end waits until everything else is written
            outcome.attempt(args.output, ERRORS, writes, args.stop_file) as stop,
            memory_told(),
        ):
            code = train(args, config, accelerator, world, stop, at_end)
        world.end()  # nobody leaves before all of it stands: a launcher ends the rest at once
        return code
    except (ConfigError, RunLocked, DiskFull, *ERRORS) as error:
        return outcome.tell(error)
    finally:
        leave(accelerator, world)


def train(
    args: argparse.Namespace, config: Config, accelerator: Accelerator, world: World,
    stop: outcome.StopRequest, at_end: ExitStack,
) -> int:  # fmt: skip
    """One training run, from examples to an exported encoder; returns the exit code."""
    settings, peak = config.training, round_lr(config.training, args.round)
    seed = (config.run.seed + 1_000_003 * args.round) % 2**62
    say = log if world.main else lambda message: None

    # 1. The encoder to start from, and which parts of it learn.
    model = args.encoder or config.encoder.model
    where = {"model": model, "device": str(accelerator.device)}
    encoder = Encoder.load(config.encoder.model_copy(update=where))
    fingerprint = f"{encoder.query_fingerprint()} {encoder.memory_fingerprint()}"
    prepare(encoder, settings, seed)

    # 2. Examples, equal on all processes: positives, hard negatives, order; held-out ones evaluate.
    selection = select(read_training(args.examples), settings)
    say(str(selection))
    world.check_same({"examples": selection.counts()})  # all of them go on, or none does
    ending = args.output, selection.counts(), say, world.main and not args.dry_run
    if not selection.items:
        return outcome.empty("no usable example, nothing to train on", *ending)
    held_out = read_held_out(config, args.held_out, args.examples, selection.items)
    if settings.eval_every:
        say(f"evaluation: {held_out}")
    size = settings.batch_size * world.size
    batches = Batches(selection.items, encoder, global_batch=size, seed=seed, settings=settings)
    steps = batches.steps
    say(f"processes x queries a step: {world.size} x {settings.batch_size} = {size}; {batches}")
    fixed = fixed_settings(
        settings, encoder=fingerprint, examples=batches.digest, warm=args.warm, steps=steps,
        held_out=held_out.digest, processes=world.size, mixed_precision=accelerator.mixed_precision,
    )  # fmt: skip
    world.check_same(fixed)
    if not batches.learnable():
        return outcome.empty("no query has a negative in its batch, nothing to learn", *ending)
    if args.dry_run:
        if world.main:
            print(yaml.safe_dump(public(config), sort_keys=False))
            print(estimate(encoder, batches, steps, settings, world.size, accelerator.autocast))
        return 0

    # 3. The optimizer; continue where an earlier run stopped.
    spread(encoder, world)
    optimizer = make_optimizer(encoder.model, settings)
    root = args.output / "checkpoints"
    state, best = resume(
        root, checkpoint.TrainState(0, fixed, seed, new_run_id()), encoder.model, optimizer, world,
        how=args.resume, allow_change=args.allow_config_change, warm=args.warm,
    )  # fmt: skip

    # 4. Train: each step's gradient is the same on all processes, and so are their weights.
    origin = {"model": model, "round": args.round, "seed": seed, "commit": commit()}
    tracker = at_end.enter_context(Tracker(
        args.output, config.wandb, run_id=state.wandb_id, done=state.step, main=world.main,
        settings={**public(config), "run_facts": {**fixed, **origin, **world.facts()}},
    ))  # fmt: skip
    gradient = ContrastiveStep(
        encoder, batches.table, settings, world, seed=seed, autocast=accelerator.autocast,
        frozen=FrozenMemories.of(encoder, batches, world, settings, accelerator.autocast),
    )  # fmt: skip
    validation = Validation(held_out, encoder, world, tracker, settings, steps=steps, weights=best)
    with without_ruined(root, world.main), batches.ahead() as batch_of:
        state, shown = validation.first(state), LogInterval()
        todo = range(state.step, state.step if validation.finished(state) else steps)
        for step in track(todo, "training") if world.main else todo:
            began = time.perf_counter()
            batch = batch_of(step)
            result = gradient.backward(batch, step, stop=stop.asked)
            lr = peak * lr_factor(step, steps, settings.warmup_ratio, settings.schedule)
            norm = update(optimizer, lr, settings.max_grad_norm)
            seconds = time.perf_counter() - began
            shown.add(result, seconds)
            gradient.check(norm, batch, step, last=result.stop or validation.pauses(step + 1))
            state = validation.after(state.after(result, seconds, batch.idle))
            last = validation.finished(state) or result.stop
            if last or state.step % settings.log_every == 0:
                tracker.show(state.step, steps, {**shown.figures(), "lr": lr, "grad_norm": norm})
            if last or state.step % settings.checkpoint_every == 0:
                best = validation.weights
                checkpoint.save(root, encoder.model, optimizer, state, best, writes=world.main)
            if last:
                break

    # 5. Export.
    done = validation.finished(state)
    if world.main:
        report = {
            **selection.counts(), **batches.counts(), **state.figures(),
            "of_steps": steps, "processes": world.size, "seed": seed, "round": args.round,
            "encoder": model, "wandb": tracker.wandb, "settings": settings.model_dump(mode="json"),
            "evaluation": validation.report(state),
        }  # fmt: skip
        if done:  # the best step's, LoRA merged, with a model card
            validation.choose()
            facts = {"base_model": base_model(model), "training": report}
            export(encoder, args.output / "encoder", facts)
        outcome.write_result(args.output, "trained" if done else "stopped", **report)
    say(validation.told(state))
    return outcome.EXIT_CODES["trained" if done else "stopped"]


if __name__ == "__main__":
    sys.exit(main())
