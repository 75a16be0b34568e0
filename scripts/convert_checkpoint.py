from astraea_jax.frontends.convert import run

if __name__ == "__main__":
    run()
