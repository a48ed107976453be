"""finepoint schema COMMAND"""

from dataclasses import dataclass

from finepoint.cli.output import print_json
from finepoint.errors import FinepointError
from finepoint.runtime.settings import close, json_schema, setting

# fmt: off


@dataclass(frozen=True, kw_only=True)
class SchemaConfig:
    """Print the JSON schema of a command's YAML file, for editors that complete and check it."""

    name: str = setting("the command, also without its flag: `finepoint schema train`", positional=True)
    json: bool = setting("print one JSON object on stdout, as it does in any case", False)


# fmt: on
CONFIG = SchemaConfig


def run(config: SchemaConfig) -> None:
    from finepoint.cli import COMMANDS, module_of

    if config.name not in COMMANDS:
        raise FinepointError(f"no command {config.name!r}{close(config.name, COMMANDS)}")
    print_json(json_schema(module_of(config.name).CONFIG, f"finepoint {config.name}"))
