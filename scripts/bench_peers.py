from astraea_jax.lab.bench_peers import run

if __name__ == "__main__":
    run()
