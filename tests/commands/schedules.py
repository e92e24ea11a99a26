"""10,000 random pipelines on the model of GPUs and NCCL: python -m tests.commands.schedules [FIRST] [LAST]

About half an hour on two cores.
"""

import sys
import warnings
from multiprocessing import Pool

NUM_CASES = 10_000
NUM_PROCESSES = 2


def run(number: int) -> str | None:
    """What was wrong with a case, if anything."""
    from tests.gpu_model.cases import check, draw_case

    warnings.simplefilter("ignore")
    case = draw_case(number)
    try:
        check(case, number)
    except Exception as error:
        return f"{number}: {case}\n{type(error).__name__}: {error}"
    return None


def main() -> None:
    first, last = (int(argument) for argument in sys.argv[1:3]) if len(sys.argv) > 2 else (0, NUM_CASES)
    num_bad = 0
    with Pool(NUM_PROCESSES) as pool:
        for done, found in enumerate(pool.imap_unordered(run, range(first, last), chunksize=20), start=1):
            if found is not None:
                num_bad += 1
                print(found, flush=True)
            if done % 500 == 0:
                print(f"{done} of {last - first} pipelines, {num_bad} wrong", flush=True)
    print(f"{last - first} pipelines, {num_bad} wrong")
    sys.exit(num_bad > 0)


if __name__ == "__main__":
    main()
