"""Remakes every table, figure and JSON under docs/results in three and a half hours on two cores. A stopped one goes on.

    python docs/reproduce.py                    # or one of them: python docs/kl3_results.py
    rm -r runs/docs                             # to begin from nothing

Seconds and memory (docs/results/performance.md) are measured by tests/benchmarks, one command a table.
"""
import pathlib
import subprocess
import sys

HOURS = {"bupo": 0.7, "main": 0.7, "em": 0.4, "kl3": 0.3, "long_cot": 1.3}  # two cores, two runs at a time; main reads bupo's


def main():
    for i, (name, hours) in enumerate(HOURS.items()):
        left = sum(list(HOURS.values())[i:])
        print(f"[{i + 1}/{len(HOURS)}] docs/{name}_results.py, about {hours} h; {left:.1f} h in all", flush=True)
        script = pathlib.Path(__file__).parent / f"{name}_results.py"
        done = subprocess.run([sys.executable, str(script), *sys.argv[1:]])
        if done.returncode:
            raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
