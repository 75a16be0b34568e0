from astraea_jax.lab.bench_fairness import run

if __name__ == "__main__":
    run()
