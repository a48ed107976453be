"""finepoint schema COMMAND"""

from finepoint.cli.output import print_json
from finepoint.config import SchemaConfig
from finepoint.errors import FinepointError
from finepoint.settings import close, json_schema

CONFIG = SchemaConfig


def run(config: SchemaConfig) -> None:
    from finepoint.cli import COMMANDS, module_of

    if config.name not in COMMANDS:
        raise FinepointError(f"no command {config.name!r}{close(config.name, COMMANDS)}")
    print_json(json_schema(module_of(config.name).CONFIG, f"finepoint {config.name}"))
