"""`srd-fast`: the verbs. Exit status 0, 2 with a line for each mistake of a user, 130 or 143 when stopped.

One file, because it is the command's manual: each verb is its words, its options and one call.
"""

import logging
import os
import shlex
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import FaultsError, UserError

if TYPE_CHECKING:
    from .run.ledger import News

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Selective reflection distillation: reflect, curate, distil, evaluate, report.",
)

_Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG", help="YAML file, a folder with config.yaml, or quickstart; srd-fast config prints every key."
    ),
]
_Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key=value]...", help="Override config keys, e.g. distill.skew=0.2.")
]
_QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="Print only warnings and errors.")]
_JsonFlag = Annotated[bool, typer.Option("--json", help="Print progress as lines of json, for other programs.")]
_Limit = Annotated[
    str | None, typer.Option(help="Such as 8GiB, 8GB or 8192MB: change sizes until the peak is below it.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        import srd_fast

        typer.echo(srd_fast.__version__)
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    pass


def _execute(
    config: Path,
    overrides: list[str] | None,
    quiet: bool = False,
    as_json: bool = False,
    fine_tuned: tuple[str, str | None] | None = None,
    **options: Any,
) -> Path | None:
    """Carry out a command that takes a config, together with the processes that a launcher started beside this one.

    Ctrl-C and SIGTERM end it with status 130 and 143 and a line that says how to go on.

    Args:
        config: the file.
        overrides: texts such as "distill.skew=0.2".
        fine_tuned: for `srd-fast sft`, which model to fine-tune and the run folder; else None.
        quiet: print only warnings and errors.
        as_json: print progress as json.
        options: further arguments of `srd_fast.run.pipeline.execute`.

    Returns:
        The run folder; in a process other than the first, None.
    """
    if quiet and as_json:
        raise UserError("--quiet and --json do not go together: give one of them")
    if quiet or as_json:
        logging.getLogger("srd_fast").setLevel(logging.WARNING)

    from transformers.utils.logging import disable_progress_bar

    from .run.group import joined
    from .run.modes import fine_tuning
    from .run.pipeline import execute, load_checked, serve
    from .run.stopping import Stopped, stoppable
    from .showing import show_as, style

    show_as("quiet" if quiet else "json" if as_json else "auto")
    if style() != "bar":
        disable_progress_bar()  # of models that are read and written
    if quiet or as_json:
        options["say"] = _say_json if as_json else _say_nothing
    if options.get("only") in (None, "distill"):
        from .memory.room import check_room

        options["checks"] = (check_room,)
    try:
        with stoppable(), joined() as group:
            if group.rank == 0:
                loaded = load_checked(config, overrides or [])
                return execute(fine_tuning(loaded, *fine_tuned) if fine_tuned else loaded, group=group, **options)
            serve(group)
    except Stopped as e:
        typer.echo(f"\n{e}; the same command goes on from here", err=True)
        raise typer.Exit(e.status) from None
    return None


def _say_nothing(news: "News") -> None:
    pass


def _say_json(news: "News") -> None:
    from .showing import say_json

    say_json(event="step", step=news.step, state=news.state, seconds=news.seconds)


def _for_one_process(verb: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if os.environ.get("RANK", "0") != "0":
            raise typer.Exit(2)
        raise UserError(f"srd-fast {verb} is for one process: start it without torchrun or accelerate launch")


@app.command()
def run(config: _Config, overrides: _Overrides = None, quiet: _QuietFlag = False, as_json: _JsonFlag = False) -> None:
    """Every step: prepare, init-student, reflect, curate, (answers,) cache, distill, evaluate, (controls,) report.

    The config's mode decides which of them there are. A step is skipped if its output exists and was made from the same
    inputs. After an interruption, the same command goes on.
    """
    folder = _execute(config, overrides, quiet, as_json)
    if folder is not None and as_json:
        from .showing import say_json

        say_json(event="end", report=str(folder / "report.html"), student=str(folder / "student"))
    elif folder is not None and not quiet:
        typer.echo(f"report: {folder / 'report.html'}")
        typer.echo(f"student: {folder / 'student'}")


@app.command()
def sft(
    config: _Config,
    overrides: _Overrides = None,
    model: Annotated[str, typer.Option(help="Which of the config's models: teacher or student.")] = "teacher",
    output: Annotated[str | None, typer.Option(help="Run folder; default: beside the config's.")] = None,
    quiet: _QuietFlag = False,
    as_json: _JsonFlag = False,
) -> None:
    """Fine-tune the teacher, or a given student, on the config's data, before the distillation.

    This is a run of mode sft without a curriculum. The last line that it prints is the key to set in the config of the
    distillation.
    """
    folder = _execute(config, overrides, quiet, as_json, fine_tuned=(model, output))
    if folder is not None and as_json:
        from .showing import say_json

        say_json(event="end", **{model: str(folder / "student")})
    elif folder is not None and not quiet:
        typer.echo(f"{model}: {folder / 'student'}")


@app.command("init")
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for config.yaml, made if it is missing.")],
    data: Annotated[str, typer.Option(help="File, folder or hub name of your rows.")],
    teacher: Annotated[str, typer.Option(help="Model folder or hub id.")] = "smollm2-135m-instruct",
    student: Annotated[str, typer.Option(help="Model folder or hub id; prune cuts it out of the teacher.")] = "prune",
    columns: Annotated[str | None, typer.Option(help="Such as instruction=question,output=answer.")] = None,
) -> None:
    """Look at your data and models, and write a commented config for them: DIR/config.yaml."""
    from .files import write_text
    from .run.first_config import first_config

    target = folder / "config.yaml"
    if target.exists():
        raise UserError(f"{target} is there already; delete it, or give another folder")
    pairs = [x.partition("=") for x in columns.split(",")] if columns else []
    text = first_config(data, teacher, student, str(folder / "run"), {a: b for a, _, b in pairs})
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"folder {str(folder)!r} cannot be made: {e}") from e
    write_text(target, text)
    typer.echo(f"config: {target}")
    typer.echo(shlex.join(["srd-fast", "run", str(target)]))


@app.command("config")
def config(
    every: Annotated[bool, typer.Option("--all", help="With the fields of transformers.TrainingArguments.")] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="A JSON schema instead, for editors.")] = False,
) -> None:
    """Print every key of a config with its default and its meaning, as a config that runs."""
    import json

    from .run import config_help

    if json_schema:
        typer.echo(json.dumps(config_help.json_schema(), indent=1))
    else:
        typer.echo(config_help.config_text(every), nl=False)


def _step_command(name: str, text: str) -> None:
    @app.command(name, help=f"{text} The steps before it must be done.")
    def command(
        config: _Config,
        overrides: _Overrides = None,
        force: Annotated[bool, typer.Option("--force", help="Do it again even if nothing has changed.")] = False,
        quiet: _QuietFlag = False,
        as_json: _JsonFlag = False,
    ) -> None:
        _execute(config, overrides, quiet, as_json, only=name, force=force)


_step_command("prepare", "Read and tokenise the data into the run folder.")


@app.command()
def reflect(
    config: _Config,
    overrides: _Overrides = None,
    shard: Annotated[
        str | None, typer.Option(help="Such as 3/16: only the third of 16 shares of the samples, for many machines.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Do it again even if nothing has changed.")] = False,
    quiet: _QuietFlag = False,
    as_json: _JsonFlag = False,
) -> None:
    """The starting student answers every training prompt: reflections.parquet. The steps before it must be done.

    With --shard, only that share's scores: reflections-00003-of-00016.parquet. Once the files of all shards are in the
    run folder, the command without --shard joins them.
    """
    _execute(config, overrides, quiet, as_json, only="reflect", force=force, shard=shard)


_step_command("curate", "Rank, drop and stage the samples: plan.json.")
_step_command("cache", "Run the teacher once over the kept samples: teacher_cache/.")
_step_command("distill", "Train along the plan: checkpoints/, metrics.jsonl, student/.")
_step_command("evaluate", "Teacher, starting and distilled student on the validation rows: summary.json.")
_step_command("controls", "Train the config's controls, from the run's start and cache: controls/.")
_step_command("report", "One page from the run folder: report.html.")


@app.command("compare")
def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN...", help="Run folders; RUN:start, RUN:student and RUN:teacher are one.")
    ],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("comparison.html"),
) -> None:
    """Compare runs on the validation rows that they share: KL, cross-entropy and ROUGE-L with paired intervals.

    Each distilled student is compared with its start, and with the student of the first run. Runs that differ only in
    the seed count as one side. Where the interval holds 0, the page says that there is no difference.
    """
    _for_one_process("compare")
    from .report import compare_runs, comparison_text, write_comparison

    comparison = compare_runs(runs)
    typer.echo(comparison_text(comparison))
    typer.echo(f"page: {write_comparison(comparison, output)}")


@app.command("memory")
def memory(
    config: _Config,
    overrides: _Overrides = None,
    limit: _Limit = None,
) -> None:
    """Predict the peak memory of the step distill, by part, and the size of the teacher cache on disk.

    With --limit, print the smallest changes that fit, as a command line. A smaller batch with correspondingly more
    accumulation steps trains the same. Exit status 2 if nothing fits.
    """
    _for_one_process("memory")
    from .memory.fitting import fit, parse_bytes
    from .memory.planner import plan as plan_memory
    from .run.config import load_run_config

    allowed = None if limit is None else parse_bytes(limit)
    given = overrides or []
    run = load_run_config(config, given)
    made = plan_memory(run) if allowed is None else fit(run, allowed)
    typer.echo(made)
    if allowed is not None:
        if not made.overrides:
            typer.echo(f"fits in {allowed / 1e9:.2f} GB as it is")
        typer.echo(shlex.join(["srd-fast", "run", str(config), *given, *made.overrides]))


@app.command("plan", hidden=True)
def plan(
    config: _Config,
    overrides: _Overrides = None,
    limit: _Limit = None,
) -> None:
    """The old name of `srd-fast memory`."""
    message = "`srd-fast plan` is called `srd-fast memory` now; the old name goes away in srd-fast 0.3"
    warnings.warn(message, FutureWarning, stacklevel=2)
    memory(config, overrides, limit)


@app.command("init-student")
def init_student(
    teacher: Annotated[str, typer.Option(help="Model folder, hub id, or smollm2-135m-instruct.")],
    output: Annotated[Path, typer.Option(help="Folder for the student.")],
    layers: Annotated[
        str, typer.Option(help="How many layers to keep (first and last ones), or a list such as 0,1,2,27,28,29.")
    ],
    encoder_layers: Annotated[
        str | None, typer.Option(help="Of an encoder-decoder model's encoder; default: as --layers.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Rows for the warm-up; required with --warmup-steps.")] = None,
    warmup_steps: Annotated[int, typer.Option(min=0, help="Steps of forward-KL distillation after the cut.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Of the warm-up.")] = 4e-4,
    batch_size: Annotated[int, typer.Option(min=1, help="Of the warm-up.")] = 16,
    template: Annotated[str, typer.Option(help="Prompt template of the warm-up rows.")] = "alpaca",
    seed: Annotated[int, typer.Option(help="Of the warm-up's order.")] = 0,
) -> None:
    """Cut a student out of a teacher by keeping some of its layers, and warm it up."""
    _for_one_process("init-student")
    kept = _layers("layers", layers)
    kept_of_encoder = None if encoder_layers is None else _layers("encoder-layers", encoder_layers)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"output {str(output)!r} is there already; delete it, or give another folder")
    if bool(data) != bool(warmup_steps):
        raise UserError("--data and --warmup-steps go together: give both for a warm-up, or neither")

    from .data import Tokenisation, prepare_dataset, read_rows
    from .models import is_encoder_decoder, load_config, load_tokenizer
    from .training.student import prune_and_warm_up

    rows = None
    if data:
        encoder_decoder = is_encoder_decoder(load_config(teacher))
        tokenisation = Tokenisation(load_tokenizer(teacher), template, encoder_decoder=encoder_decoder)
        rows = prepare_dataset(read_rows(data), tokenisation).dataset
    prune_and_warm_up(
        teacher,
        output,
        layers=kept,
        encoder_layers=kept_of_encoder,
        rows=rows,
        warmup_steps=warmup_steps,
        learning_rate=learning_rate,
        batch_size=batch_size,
        seed=seed,
        template=template,
    )
    typer.echo(f"student: {output}")


def _layers(name: str, given: str) -> int | list[int]:
    try:
        return [int(x) for x in given.split(",")] if "," in given else int(given)
    except ValueError:
        raise UserError(f"{name} must be a number or a list of numbers, got {given!r}") from None


def _quiet() -> None:
    # On a CPU whose cores are shared, threads that spin while they wait cost several times what sleeping does. This is
    # read when torch is first imported, so it is set before any command imports it.
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # By default oneDNN keeps the code of a thousand shapes of products, megabytes each. A step has 64 to 128 (with
    # room for 64 it takes a sixth longer), and without padding no two batches have the same.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # FutureWarnings of other packages are for developers, our own for users: see "Deprecations" in CONTRIBUTING.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("default", ".* goes away in srd-fast ", FutureWarning)
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("srd_fast")
    logger.handlers[:], logger.propagate = [handler], False
    logger.setLevel(logging.INFO)


def _alive(rank: str) -> AbstractContextManager[None]:
    """Show on the terminal that the command is at work, starting before its imports."""
    if rank != "0" or not sys.stderr.isatty() or {"--quiet", "-q", "--json"}.intersection(sys.argv[1:]):
        return nullcontext()
    from .showing import alive

    return alive()


def _silent(rank: str) -> None:
    """In all processes but the first, show no log messages, progress bars or error lines."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    warnings.simplefilter("ignore")
    logger = logging.getLogger("srd_fast")
    logger.setLevel(logging.ERROR)
    logger.handlers[0].setFormatter(logging.Formatter(f"process {rank}: %(message)s"))
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 2, never a traceback."""
    _quiet()
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        _silent(rank)
    try:
        with _alive(rank):
            app()
    except UserError as e:
        faults = [fault.text for fault in e.faults] if isinstance(e, FaultsError) else [str(e)]
        if "--json" in sys.argv[1:]:
            from .showing import say_json

            say_json(event="error", faults=faults)
        for text in faults:
            typer.echo(f"error: {' '.join(text.split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
