from astraea_jax.frontends.serve import run

if __name__ == "__main__":
    run()
