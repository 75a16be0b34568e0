from astraea_jax.lab.bench_attention import run

if __name__ == "__main__":
    run()
