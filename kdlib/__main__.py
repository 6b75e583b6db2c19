"""``python -m kdlib``: run, results, export, doctor, bench."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

PLACES = ("KDLIB_HOME", "KDLIB_DATA", "KDLIB_RESULTS")  # a kernel starts in another folder


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, do what it says, return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kdlib", description="Run and prepare the chapters of the course.")
    parser.add_argument("command", choices=["run", "results", "export", "doctor", "bench"])
    parser.add_argument("chapters", nargs="*", help="01 a lesson, 01s its study, all lessons (default), studies")
    parser.add_argument("--scale", choices=["smoke", "lab", "full"], help="sets KDLIB_SCALE")
    parser.add_argument("--seeds", help="sets KDLIB_SEEDS")
    parser.add_argument("--jobs", help="sets KDLIB_JOBS, processes that share the runs of a grid")
    parser.add_argument("--rehearse", action="store_true", help="a few batches of each run: parameters, memory, hours")
    parser.add_argument("--in-place", action="store_true", help="write the outputs back into the notebooks")
    parser.add_argument("--out", type=Path, help="folder of the executed notebooks, else in KDLIB_HOME")
    parser.add_argument("--check", action="store_true", help="results: write nothing, fail if a table is out of step")
    args = parser.parse_args(arguments)
    given = {"SCALE": args.scale, "SEEDS": args.seeds, "JOBS": args.jobs, "REHEARSE": "1" if args.rehearse else None}
    os.environ |= {f"KDLIB_{name}": value for name, value in given.items() if value}
    os.environ |= {name: str(Path(os.environ[name]).expanduser().resolve()) for name in PLACES if os.environ.get(name)}
    for stream in (sys.stdout, sys.stderr):  # a Windows console has no ✓
        stream.reconfigure(errors="replace")

    from kdlib import course

    if args.command == "run":
        done = course.run(course.notebooks(args.chapters or ["all"]), out=args.out, in_place=args.in_place)
    elif args.command == "export":
        sys.stdout.reconfigure(encoding="utf-8")  # it is redirected into a file of source
        done = print(course.export(*args.chapters), end="") is None
    elif args.command == "bench":
        done = not subprocess.call([sys.executable, str(course.ROOT / "tests" / "benchmarks" / "bench.py")])
    else:
        done = course.results(check=args.check) if args.command == "results" else course.doctor()
        done |= args.command == "results" and not args.check
    return 0 if done else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where this one stopped", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FileNotFoundError, ModuleNotFoundError) as error:
        sys.exit(f"kdlib: {error}")
