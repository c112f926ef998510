"""Train or evaluate a network, on one process or under torchrun.

    python main.py --kw_config configs/quickstart/kw1x_resnet18.json --output_dir output/kw1x
    python main.py --kw_config output/kw1x/config.json --eval true --resume output/kw1x/checkpoint-best.pth
    torchrun --nproc_per_node 8 main.py --kw_config configs/resnet18/kw4x_resnet18.json --data_path FOLDER

Every field of a configuration is an option too, and wins over the file: see --help.
"""

import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Outside of a training, which saves its state first, Ctrl+C is to end this as SIGTERM does: at once and in no words.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# Python puts this folder first, where datasets/ would shadow Hugging Face's package of that name.
if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)

from kernelwarehouse.configs.schema import ConfigError
from kernelwarehouse.engine import (
    EXIT_INTERRUPTED,
    Interrupted,
    NonFiniteLossError,
    SaveError,
    complain,
    dry_run,
    evaluate_run,
    flush_errors,
    join,
    keep_freed_memory,
    parse_arguments,
    train_run,
)
from kernelwarehouse.models import CheckpointError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, as --help describes it."""
    try:
        config = parse_arguments(arguments)
        with join(config.run) as world:
            if world.device.type == "cpu":
                keep_freed_memory()
            if config.run.eval:
                evaluate_run(config, world)
            elif config.run.dry_run:
                dry_run(config, world)
            else:
                train_run(config, world)
    except (ConfigError, CheckpointError) as e:
        complain(f"error: {e}")
        return 2
    except (NonFiniteLossError, SaveError) as e:
        complain(f"error: {e}")
        return 1
    except Interrupted as e:
        complain(str(e))
        return EXIT_INTERRUPTED
    finally:
        flush_errors()
    return 0


if __name__ == "__main__":
    sys.exit(main())
