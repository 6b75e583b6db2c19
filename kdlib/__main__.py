"""``python -m kdlib``: names only, the work is in :mod:`kdlib.course`."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

try:
    from kdlib import scale
except ModuleNotFoundError as error:  # what doctor would say, were it there to say it
    sys.exit(f"the package {error.name} is missing: pip install -r requirements.txt")


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m kdlib", description="Run and prepare the chapters of the course.")
    commands = main.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute chapters")
    run.add_argument("chapters", nargs="+", help="numbers such as 00, or all")
    run.add_argument("--scale", choices=scale.SCALES, help="default: lab with a GPU, smoke without")
    run.add_argument("--seeds", type=int, help="number of seeds; default: the chapter's")
    run.add_argument(
        "--jobs", type=int, help="processes to spread training runs over; default: one a core, 1 with a GPU"
    )
    run.add_argument(
        "--rehearse", action="store_true", help="a few batches of a few examples: parameters, memory, hours"
    )
    run.add_argument("--record", action="store_true", help="with --rehearse: keep the estimates, for the headers")
    run.add_argument("--in-place", action="store_true", help="write the outputs back into notebooks/")
    run.add_argument("--out", type=Path, help="folder for executed notebooks and figures")
    commands.add_parser("doctor", help="what this machine can run, and what is missing")
    for name, text in (("results", "the README's tables, from results/*.json"), ("student", "the versions with open exercises"),
                       ("stamp", "headers, badges and Colab cells")):  # fmt: skip
        commands.add_parser(name, help=text).add_argument(
            "--check", action="store_true", help="only say whether it is up to date"
        )
    export = commands.add_parser("export", help="a chapter's method as a module")
    export.add_argument("chapter")
    export.add_argument("-o", "--output", type=Path, help="default: print it")
    band = commands.add_parser("band", help="record the band of a chapter's smoke results")
    band.add_argument("chapter")
    band.add_argument("--seeds", type=int, default=8)
    commands.add_parser("bench", help="time a distillation step against a plain loop")
    return main


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return 0 if _do(args) else 1
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"the package {error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on where this one stopped", file=sys.stderr)
        return 130


def _do(args: argparse.Namespace) -> bool:
    from kdlib.course import chapters

    if args.command == "run":
        return _run(args)
    if args.command == "doctor":
        from kdlib.course import doctor

        return doctor.report()
    if args.command == "bench":
        runpy.run_path(str(chapters.root() / "tests" / "benchmarks" / "bench.py"), run_name="__main__")
        return True
    if args.command == "export":
        return _export(args)
    if args.command == "band":
        from kdlib.course import band

        return all(band.record(chapter, args.seeds) for chapter in chapters.chapters([args.chapter]))
    return _prepare(args.command, args.check)


def _run(args: argparse.Namespace) -> bool:
    from kdlib.course import chapters, execute

    options = {"KDLIB_SCALE": args.scale or scale.scale()}
    options |= {f"KDLIB_{name.upper()}": str(getattr(args, name)) for name in ("seeds", "jobs") if getattr(args, name)}
    if args.rehearse:
        options["KDLIB_REHEARSE"] = "1"
    if args.in_place and args.rehearse:
        raise ValueError("a rehearsal's outputs are not results; leave out --in-place")
    if args.record and not args.rehearse:
        raise ValueError("--record keeps what a rehearsal estimated; give it together with --rehearse")
    chosen = chapters.chapters(args.chapters)
    more = {"out": args.out, "in_place": args.in_place, "record": args.record}
    return all([execute.run(chapter, options, **more) for chapter in chosen])


def _export(args: argparse.Namespace) -> bool:
    from kdlib import files
    from kdlib.course import cells, chapters

    source = cells.export(chapters.chapters([args.chapter])[0].path)
    if args.output is None:
        print(source)
        return True
    with files.atomic(args.output) as part:
        part.write_text(source, encoding="utf-8")
    return True


def _prepare(command: str, check: bool) -> bool:
    from kdlib.course import chapters, results, stamp, student

    if command == "results":
        good = results.update(check)
    else:
        work = {"student": student.update, "stamp": stamp.stamp}[command]
        good = all([work(chapter, check) for chapter in chapters.CHAPTERS])
    if not good:
        print(f"not up to date: run python -m kdlib {command}", file=sys.stderr)
    return good


if __name__ == "__main__":
    sys.exit(main())
