"""`finepoint watch`: a run's loss, rate and time left, from another terminal."""

from dataclasses import dataclass
from pathlib import Path

from finepoint.cli.output import print_json
from finepoint.runtime.settings import JSON, setting


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Follow a run from another terminal: step, loss, rate, tokens a second, time left; or say how it ended."""

    folder: str = setting("its --output, also without its flag: `finepoint watch DIR`", positional=True)
    json: bool = setting(JSON + "; as it stands now, without waiting", False)


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
