"""Commands that train, choose and measure: demo, train, align, select, plan, eval, watch."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from finepoint.alignment.settings import AlignConfig
from finepoint.cli.output import print_json, print_table, signed
from finepoint.errors import FinepointError
from finepoint.evaluation.settings import DemoConfig, EvalConfig
from finepoint.runtime import distributed
from finepoint.runtime.settings import JSON, setting
from finepoint.selection.settings import SelectConfig
from finepoint.training.settings import PlanConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Follow a run from another terminal: step, loss, rate, tokens a second, time left; or say how it ended."""

    folder: str = setting("its --output, also without its flag: `finepoint watch DIR`", positional=True)
    json: bool = setting(JSON + "; as it stands now, without waiting", False)


def run_demo(config: DemoConfig) -> None:
    from finepoint.evaluation.demo import run_demo

    started = time.perf_counter()
    found = run_demo(config)
    if config.json:
        print_json(found)
        return
    print_demo(found)
    print(f"\n{time.perf_counter() - started:.0f} s in all; adapters and data are in {config.output}. Next:\n"
          f"  finepoint inspect {config.output}/columns-held\n"
          f"  finepoint chat --model smollm2 --adapter {config.output}/columns-held")  # fmt: skip


def print_demo(found: dict[str, Any]) -> None:
    """The table of the demo: a column for the base and for each arm, ± one standard error."""
    from finepoint.evaluation.scores import with_error

    base, runs = found["base"], found["runs"]
    settings = found["settings"]
    rows: list[list[Any]] = []
    for kind, measure in (("id", "accuracy"), ("ood", "accuracy"), ("probe", "nll")):
        for name, scores in base[kind].items():
            what = {"id": "accuracy", "ood": "accuracy", "probe": "nats a token"}[kind]
            row = [f"{name} ({kind.upper() if kind != 'probe' else kind}), {what}"]
            row += [with_error(scores[measure], scores.get("stderr"))]
            for r in runs.values():
                ours = r[kind][name]
                change = signed(r[f"{kind}_change"][name])
                row += [f"{with_error(ours[measure], ours.get('stderr'))} ({change})"]
            rows.append(row)
            if kind == "probe":
                rows.append(
                    [f"{name} (probe), KL to the base", "-", *(f"{r[kind][name]['kl']:.4f}" for r in runs.values())]
                )
    means = [r["ood_mean"] for r in runs.values()]
    row = ["mean OOD accuracy", f"{means[0]['base']:.3f}"]
    rows.append(row + [f"{mean['adapted']:.3f} ({signed(mean['change'])})" for mean in means])
    rows.append(["trained numbers", "-", *(f"{r['trained']:,}" for r in runs.values())])
    rows.append(["adapter", "-", *(f"{r['adapter_bytes'] / 1e6:.2f} MB" for r in runs.values())])
    rows.append(["time, selection + training", "-",
                 *(f"{r['selection_seconds']:.0f} + {r['train_seconds']:.0f} s" for r in runs.values())])  # fmt: skip
    rows.append(["peak memory", "-", *(f"{r['peak_bytes'] / 2**30:.2f} GiB" for r in runs.values())])
    title = (f"SmolLM2-135M, density {settings['density']:g} (columns {settings['columns']:g}), {settings['steps']} "
             f"steps of 16, {settings['dtype']}, seed {settings['seed']}")  # fmt: skip
    print_table(["", "base", *(f"{arm} (lr {r['lr']:g})" for arm, r in runs.items())], rows, title=title)


def run_train(config: TrainConfig) -> None:
    if config.density == "auto":
        from finepoint.studies.density import train_auto

        train: Callable[[TrainConfig], dict[str, Any]] = train_auto

        if distributed.launched():
            raise FinepointError("the search of --density auto runs in one process; start it without a launcher")
    else:
        from finepoint.evaluation.before_after import keep_answers
        from finepoint.training.run import train as train_once

        train = partial(train_once, afterwards=keep_answers)

    if config.fit:
        from finepoint.memory.fit import fitted

        config = fitted(config)
    record = train(config)
    if not distributed.is_first():
        return
    if config.json:
        print_json({"output": config.output, **record})
        return
    if "search" in record:
        print_search(record["search"])
    what = "numbers" if record.get("baseline") else "entries"
    print(
        f"trained {record['trained']:,} {what} for {record['steps']} steps in {record['seconds']:.0f} s, "
        f"{record['selection_seconds']:.0f} s of them before the first; loss {record['first_loss']:.3f} on the first "
        f"batch, {record['last_loss']:.3f} on the last; {record['changed']:,} stored weights "
        f"changed{lost(record)}\n{kept(record)}adapter: {config.output} ({record['adapter_bytes']:,} bytes); "
        f"peak memory {record['peak_bytes'] / 2**30:.2f} GiB"
    )


def kept(record: dict[str, Any]) -> str:
    """How a budget of disturbance was kept, if there was one, in words."""
    if not (found := record.get("disturbed")):
        return ""
    scaled = "" if found["scale"] == 1 else f", scaled by {found['scale']:.3g} from {found['kl_before']:.3g}"
    told = f"KL to the base on {found['texts']} texts held out: {found['kl']:.3g} nats a token{scaled}; "
    return f"{told}at most {record['config']['disturb_at_most']:g}; strength {found['strength']:.3g} at the end\n"


def lost(record: dict[str, Any]) -> str:
    """What rounding to the weights' dtype has taken of the training, in words."""
    if not record["vanished"]:
        return ""
    what = "to reach another code" if record["config"].get("on_grid") else "for their dtype"
    return f", {record['vanished']:,} moved too little {what} and hold the base's value"


def print_search(trials: list[dict[str, Any]]) -> None:
    """A row a trial, the longest runs first, each rung by its loss."""
    columns = ["steps", "density", "lr", "trained", "validation_loss", "last_validation_loss", "last_loss", "kl"]
    losses = {id(trial): inf if trial["validation_loss"] is None else trial["validation_loss"] for trial in trials}
    ordered = sorted(trials, key=lambda trial: (-trial["steps"], losses[id(trial)]))  # those that failed are the last
    rows = [[f"{trial[name]:g}" if name in ("density", "lr") else trial[name] for name in columns] for trial in ordered]
    print_table(
        ["steps", "density", "lr", "trained", "best validation loss", "last", "training loss", "KL on prompts"], rows
    )


def run_align(config: AlignConfig) -> None:
    from finepoint.alignment.align import align

    record = align(config)
    if config.json:
        print_json({"output": config.output, **record})
        return
    before, after = record["before"], record["after"]
    rows = [
        [name, before.get(name, "-"), value, signed(value - before[name]) if name in before else "-"]
        for name, value in after.items()
    ]
    print_table(["on " + record["measured_on"], "before", "after", "change"], rows)
    print(
        f"trained {record['trained']:,} numbers for {record['steps']} steps in {record['train_seconds']:.0f} s; "
        f"{record['changed']:,} stored weights changed\nadapter: {config.output} ({record['adapter_bytes']:,} bytes); "
        f"peak memory {record['peak_bytes'] / 2**30:.2f} GiB"
    )


def run_select(config: SelectConfig) -> None:
    from finepoint.training.context import choose

    selection = choose(config)
    if not distributed.is_first():
        return
    statistics = selection.statistics
    if config.json:
        print_json({"output": config.output, "rule": selection.rule, **statistics})
        return
    print(
        f"{selection.rule}: {statistics['chosen']:,} of {statistics['entries']:,} entries "
        f"(density {statistics['density']:.3g}) in {len(selection)} weights -> {config.output}"
    )
    rows = [
        [kind, which, *(f"{value:.3g}" for value in statistics[kind][which].values())]
        for kind in ("abs_weight", "abs_gradient")
        if kind in statistics
        for which in ("chosen", "all")
    ]
    print_table(["quantiles", "of", *statistics["abs_weight"]["all"]], rows)
    print(f"share of chosen with |weight| < 1e-4: {statistics['near_zero_share']:.3f} "
          f"(of all: {statistics['near_zero_share_of_all']:.3f})")  # fmt: skip


def run_plan(config: PlanConfig) -> None:
    from finepoint.cli.next_step import say_planned
    from finepoint.memory.plan import PARTS, plan
    from finepoint.models.loading import SHAPES

    found = plan(config)
    verdict = fits_here(config, found)
    passes = {"selection": found.selection, "training": found.training}
    peaks = {f"{name}_peak_bytes": parts and sum(parts.values()) for name, parts in passes.items()}
    if config.json:
        print_json({"model": config.model, **asdict(found), **peaks, **verdict})
        return
    print(
        f"{config.model}: {found.parameters:,} parameters in {found.dtype} on {found.device}; {found.trained:,} of "
        f"{found.entries:,} target entries trained; {config.batch_size} x {config.tokens} tokens a batch"
    )
    shown = {name: parts for name, parts in passes.items() if parts}
    rows = [
        [meaning, *(parts.get(part, 0) / 2**30 for parts in shown.values())]
        for part, meaning in PARTS.items()
        if any(part in parts for parts in shown.values())
    ]
    rows.append(["peak", *(sum(parts.values()) / 2**30 for parts in shown.values())])
    print_table(["GiB, at the peak", *shown], rows)
    if told := verdict["verdict"]:
        print(told)
    if config.model not in SHAPES:  # which have no weights
        say_planned(config, verdict["fits"])


def fits_here(config: PlanConfig, found: Any) -> dict[str, Any]:
    """Whether a plan fits this machine, with a margin, and what would; nothing is said of a device that is not here."""
    from finepoint.memory.fit import MARGIN, WAY_OUT, fitting
    from finepoint.runtime.devices import here, room_bytes

    room = room_bytes(found.device) if here(found.device) else None
    if room is None:
        return {"room_bytes": None, "fits": None, "verdict": ""}
    peak = max(sum(parts.values()) for parts in (found.selection, found.training) if parts)
    there, fits = f"{room / 2**30:.2f} GiB there", peak * MARGIN <= room
    if fits:
        verdict = f"It fits: {peak / 2**30:.2f} GiB planned, {there}."
    elif other := fitting(config, config.batch_size, room):
        verdict = (f"It does not fit: {peak / 2**30:.2f} GiB planned, {there}. {other} would ({other.peak / 2**30:.2f} "
                   "GiB); finepoint train --fit chooses by itself.")  # fmt: skip
    else:
        verdict = f"It does not fit: {peak / 2**30:.2f} GiB planned, {there}, and neither does one example; {WAY_OUT}."
    return {"room_bytes": room, "fits": fits, "verdict": verdict}


def run_eval(config: EvalConfig) -> None:
    from finepoint.evaluation.evaluate import evaluate_config
    from finepoint.runtime.files import write_json

    found = evaluate_config(config)
    if config.output:
        from pathlib import Path

        write_json(Path(config.output), found)
    if config.json:
        print_json(found)
    else:
        print_scores(found)


def print_scores(found: dict[str, Any]) -> None:
    """The table of the scores, what ± is in it, and of classifiers what was answered as what."""
    from finepoint.evaluation.scores import NOTE, confusions, table

    print_table(*table(found))
    print(NOTE)
    for title, rows in confusions(found):
        print()
        print_table(*rows, title=title)


def run_watch(config: WatchConfig) -> None:
    from finepoint.runtime.progress import console, progress
    from finepoint.training.watching import followed, standing, told

    folder = Path(config.folder)
    found = standing(folder)
    if config.json:
        print_json(found)
        return
    if found["state"] != "training" or not console.is_terminal or not found["steps"]:
        for found in followed(folder):
            print(told(found), flush=True)
        return
    with progress("training", found["steps"]) as bar:
        bar.start(found["step"])
        for found in followed(folder):
            bar(found["step"] - bar.done)
            bar.tell(told(found).partition(", ")[2])
    print(told(found))
