"""`ip2p-infer`: a trained pipeline and pictures in, edited pictures out; or scores, or a file."""

import sys
from collections.abc import Sequence

from ..encode.base.begin import begin
from ..encode.base.console import quiet_libraries
from ..encode.base.errors import user_errors
from ..encode.base.flags import parse
from ..encode.config import Dataset
from ..encode.data.places import check_dataset
from .config import EvaluateConfig, InferConfig
from .kind import check_local

PROG = "ip2p-infer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status, 0 or 1; `argv` defaults to the command line.

    Wrong flags, models and datasets end it through SystemExit with status 2, and Ctrl-C with 130.
    """
    # The rest is imported once flags are read: torch takes seconds to import, and --help shall not.
    with user_errors(PROG):
        arguments = begin(argv)
        if arguments and arguments[0] == "evaluate":
            scoring = parse(EvaluateConfig, arguments[1:], f"{PROG} evaluate")
            check_local(scoring.model, scoring.loading.lora)
            check_dataset(Dataset(dataset_name=scoring.dataset))
            quiet_libraries()
            from .score.evaluate import evaluate

            return evaluate(scoring)
        if arguments and arguments[0] == "export":
            from .export import ExportConfig, export

            exporting = parse(ExportConfig, arguments[1:], f"{PROG} export")
            check_local([exporting.model], exporting.weights.lora)
            quiet_libraries()
            return export(exporting)
        config = parse(InferConfig, arguments, PROG)
        check_local([config.model], config.loading.lora)
        if config.inputs.table:
            check_dataset(Dataset(dataset_name=config.inputs.table))
        quiet_libraries()
        if config.page.ui:
            from .ui.serve import serve

            return serve(config)
        from .batch import edit

        return edit(config)


if __name__ == "__main__":
    sys.exit(main())
