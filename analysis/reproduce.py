"""Makes the tables, figures and JSON of five pages again, five hours on two cores.

    python -m analysis.reproduce        # or one of them: python -m analysis.kl3_results
    rm -r runs/analysis                 # to begin from nothing; else a stopped one goes on

Another machine rounds otherwise, so digits will differ. A page says which commits its tables are of
and which of their arms are no longer made; accuracy is over 1,024 problems, in older tables over
128. Seconds and memory (results/performance.md) are measured by tests/benchmarks,
a command per table.
"""
import subprocess
import sys

HOURS = {"bupo": 1.5, "main": 0.7, "em": 0.7, "kl3": 0.5, "long_cot": 1.6}  # main reads bupo's


def main():
    left = sum(HOURS.values())
    for name, hours in HOURS.items():
        print(f"analysis.{name}_results, about {hours} h; {left:.1f} h in all", flush=True)
        command = [sys.executable, "-m", f"analysis.{name}_results", *sys.argv[1:]]
        done = subprocess.run(command)
        if done.returncode:
            raise SystemExit(done.returncode)
        left -= hours


if __name__ == "__main__":
    main()
