"""A program with an LLM of two ranks that tells who they are and waits to be killed."""

from __future__ import annotations

import sys
import time

import psutil

from headrace import LLM

if __name__ == "__main__":
    llm = LLM(sys.argv[1], tp=2, kv_gib=0.01, linears="module")
    print("ranks", *(child.pid for child in psutil.Process().children()), flush=True)
    time.sleep(600)
