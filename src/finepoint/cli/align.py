"""finepoint align --model M --method dpo|grpo --data F --output DIR"""

from finepoint.alignment.settings import AlignConfig
from finepoint.cli.output import print_json, print_table, signed

CONFIG = AlignConfig


def run(config: AlignConfig) -> None:
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
