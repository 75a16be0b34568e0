from astraea_jax.lab.bench_agents import run

if __name__ == "__main__":
    run()
