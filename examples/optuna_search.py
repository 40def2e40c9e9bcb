"""A search with Optuna: it is asked for parameters, the cluster tries them, it is told how good they were. Needs ``optuna``.

As many trials are under way as there are workers; when one is done, the next is asked for, so that Optuna knows all results
so far. One that fails is told as failed and the search goes on. Prints::

    100 trials, 5 failed
    the loss is below 10: True
"""

from concurrent.futures import FIRST_COMPLETED

import optuna

from zmqsched import Client, LocalCluster, wait

TRIALS = 100
WORKERS = 4


def loss(number: int, x: float, y: float) -> float:
    """Himmelblau's function, in place of the training of a model. It is 0 in four places."""
    if number % 20 == 7:
        raise RuntimeError("this training did not converge")
    return (x * x + y - 11) ** 2 + (x + y * y - 7) ** 2


def main() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=1, constant_liar=True))

    with LocalCluster(WORKERS) as cluster, Client(cluster) as client:
        running = {}

        def ask() -> None:
            trial = study.ask()
            x, y = trial.suggest_float("x", -5, 5), trial.suggest_float("y", -5, 5)
            running[client.submit(loss, trial.number, x, y)] = trial

        for _ in range(WORKERS):
            ask()
        while running:
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                trial = running.pop(future)
                if future.exception():
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, future.result())
                if len(study.trials) < TRIALS:
                    ask()

    failed = study.get_trials(states=[optuna.trial.TrialState.FAIL])
    print(f"{len(study.trials)} trials, {len(failed)} failed")
    print("the loss is below 10:", study.best_value < 10)


if __name__ == "__main__":
    main()
