"""Commands on quantised files: patch, unpatch."""

from dataclasses import dataclass

from finepoint.cli.output import print_json
from finepoint.runtime.settings import JSON, setting

COPY = "copy to write, a .gguf file; the file itself is changed, all of it or not at all, where not given"

# fmt: off


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Change the codes of a quantised GGUF file that an adapter changes; all others keep their bits."""

    file: str = setting("the GGUF file that the adapter was trained on, or smollm2 or gemma3-270m", positional=True)
    adapter: str = setting(
        "adapter folder, or what export --format gguf-patch wrote; --patch is the same flag", positional=True,
        also="patch")
    output: str | None = setting(COPY, None)
    overwrite: bool = setting("allow a copy that exists already", False)
    json: bool = setting(JSON, False)


@dataclass(frozen=True, kw_only=True)
class UnpatchConfig:
    """Take a patched GGUF file back to what it was, bit for bit."""

    file: str = setting("the patched GGUF file", positional=True)
    patch: str | None = setting(
        "what export --format gguf-patch wrote, where FILE.gguf.finepoint is not beside the file any more", None)
    output: str | None = setting(COPY, None)
    overwrite: bool = setting("allow a copy that exists already", False)
    json: bool = setting(JSON, False)


# fmt: on


def run_patch(config: PatchConfig) -> None:
    from finepoint.exchange.gguf_patch import patch_file

    found = patch_file(config.file, config.adapter, config.output, config.overwrite)
    if config.json:
        print_json(found)
        return
    print(f"{found['output']}: {found['changed']:,} codes changed for {found['entries']:,} entries of "
          f"{found['adapter']}, {found['lost']:.1%} of the length of the change lost to its grid; {found['output']}"
          f".finepoint ({found['patch_bytes']:,} bytes) takes it back")  # fmt: skip
    if found["clamped"]:
        print(f"{found['clamped']:,} entries stay at the end of their block's range")


def run_unpatch(config: UnpatchConfig) -> None:
    from finepoint.exchange.gguf_patch import unpatch_file

    found = unpatch_file(config.file, config.patch, config.output, config.overwrite)
    if config.json:
        print_json(found)
    else:
        print(f"{found['output']} is as it was before {found['changed']:,} codes were changed, bit for bit")
