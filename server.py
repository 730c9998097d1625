"""Starts the HTTP server: `python server.py --help` lists its flags."""

from pyllama.server.main import main

if __name__ == "__main__":
    raise SystemExit(main())
