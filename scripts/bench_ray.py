from astraea_jax.lab.bench_ray import run

if __name__ == "__main__":
    run()
