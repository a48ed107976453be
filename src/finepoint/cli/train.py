"""finepoint train --model M --data F --rule gallop --density 0.001 --output DIR"""

from finepoint.cli.output import print_json
from finepoint.config import TrainConfig

CONFIG = TrainConfig


def run(config: TrainConfig) -> None:
    from finepoint.training.run import train

    record = train(config)
    if config.json:
        print_json({"output": config.output, **record})
        return
    print(
        f"trained {record['trained']:,} entries for {record['steps']} steps in {record['seconds']:.0f} s (selection "
        f"{record['selection_seconds']:.0f} s); loss {record['first_loss']:.3f} -> {record['last_loss']:.3f}; "
        f"{record['changed']:,} stored weights changed\n"
        f"adapter: {config.output} ({record['adapter_bytes']:,} bytes); "
        f"peak memory {record['peak_bytes'] / 2**30:.2f} GiB"
    )
