"""`python -m kdp` runs the command line."""
from kdp.app import app

if __name__ == "__main__":
    app(prog_name="kdp")
