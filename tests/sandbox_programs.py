"""Families of solutions, as contest programs are written: each computes for a while and prints one deterministic answer."""

from __future__ import annotations

import random
from typing import NamedTuple


class Program(NamedTuple):
    name: str
    code: str
    input: str


FAMILIES = {
    "sum in a loop": "s = 0\nfor i in range({n} * 1500): s += i * i % 7\nprint(s)",
    "sieve": """
n = {n} * 1500
sieve = bytearray([1]) * (n + 1)
for p in range(2, int(n ** .5) + 1):
    if sieve[p]: sieve[p * p :: p] = bytes(len(range(p * p, n + 1, p)))
print(sum(sieve) - 2)""",
    "knapsack": """
best = [0] * ({n} // 2 + 1)
for w, v in ((3 * k % 41 + 1, 7 * k % 53) for k in range(60)):
    for c in range({n} // 2, w - 1, -1): best[c] = max(best[c], best[c - w] + v)
print(best[-1])""",
    "breadth-first search": """
from collections import deque
size = {n} // 6
wall = {{(x, y) for x in range(size) for y in range(size) if (x * 7 + y * 13) % 5 == 0}}
seen, queue = {{(0, 1): 0}}, deque([(0, 1)])
while queue:
    x, y = queue.popleft()
    for p in ((x + 1, y), (x - 1, y), (x, y + 1), (x, y - 1)):
        if 0 <= p[0] < size and 0 <= p[1] < size and p not in wall and p not in seen:
            seen[p] = seen[x, y] + 1; queue.append(p)
print(len(seen), max(seen.values()))""",
    "shortest paths": """
import heapq
n = {n} * 10
graph = [[((i * 31 + 7) % n, i % 11 + 1), ((i * 17 + 3) % n, i % 5 + 2), ((i + 1) % n, 9)] for i in range(n)]
far = [10 ** 9] * n; far[0] = 0; heap = [(0, 0)]
while heap:
    d, u = heapq.heappop(heap)
    if d > far[u]: continue
    for v, w in graph[u]:
        if d + w < far[v]: far[v] = d + w; heapq.heappush(heap, (d + w, v))
print(sum(far))""",
    "recursion with a cache": """
import sys
from functools import lru_cache
sys.setrecursionlimit(100000)
@lru_cache(None)
def f(a, b): return 1 if a == 0 or b == 0 else (f(a - 1, b) + f(a, b - 1)) % 1000000007
print(f({n} // 4, {n} // 5))""",
    "deep recursion in a thread": """
import sys, threading
sys.setrecursionlimit(10 ** 6); threading.stack_size(1 << 26)
def f(n): return 0 if n == 0 else f(n - 1) + n % 3
t = threading.Thread(target=lambda: print(f({n} * 20))); t.start(); t.join()""",
    "a thread that computes": """
import threading
def work(): print(sum(i * i % 7 for i in range({n} * 1000)))
t = threading.Thread(target=work); t.start(); t.join()""",
    "four threads and a lock": """
import threading
total, lock = 0, threading.Lock()
def work(k):
    global total
    part = sum(i % (k + 2) for i in range({n} * 300))
    with lock: total += part
threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print(total)""",
    "a thread pool": """
from concurrent.futures import ThreadPoolExecutor
def work(k): return sum(i * k % 11 for i in range({n} * 120))
with ThreadPoolExecutor(4) as pool: print(*pool.map(work, range(8)))""",
    "producer and consumer": """
import queue, threading
q, seen = queue.Queue(8), []
def consume():
    while (item := q.get()) is not None: seen.append(item * item % 97)
t = threading.Thread(target=consume); t.start()
for i in range({n} * 6): q.put(i)
q.put(None); t.join()
print(sum(seen))""",
    "asyncio": """
import asyncio
async def work(k):
    s = 0
    for i in range({n}): s += i * k; await asyncio.sleep(0) if i % 50 == 0 else None
    return s
async def main(): print(sum(await asyncio.gather(*map(work, range(20)))))
asyncio.run(main())""",
    "words of the input": """
import sys
from collections import Counter
words = sys.stdin.read().split()
print(*(f"{{w}}:{{c}}" for w, c in sorted(Counter(words).items(), key=lambda p: (-p[1], p[0]))), sep="\\n")""",
    "an order of hashes": "print(*{{f'k{{i * {n} % 977}}' for i in range({n} * 3)}}, sep=',')",
    "seeded random numbers": """
import random
random.seed({n})
print(sum(random.random() < .5 for _ in range({n} * 600)), random.sample(range(1000), 5))""",
    "large integers": "x = 3 ** ({n} * 12)\nprint(len(str(x)), x % 1000000007, sum(map(int, str(x))))",
    "decimals": "from decimal import Decimal, getcontext\ngetcontext().prec = {n}\nprint(Decimal(2).sqrt() + Decimal(1) / 7)",
    "long output": "import sys\nsys.stdout.write('\\n'.join(f'{{i}} {{i * i}}' for i in range({n} * 30)))",
    "sorting": "data = [(i * 7919) % 100003 for i in range({n} * 300)]\ndata.sort(key=lambda v: (v % 97, -v))\nprint(data[:5], data[-5:])",
    "regular expressions": """
import re
text = ' '.join(f'a{{i % 13}}b{{i % 7}}' for i in range({n} * 20))
print(len(re.findall(r'a(\\d+)b\\1\\b', text)), re.sub(r'a(1\\d?)b', r'<\\1>', text)[:60])""",
}
"""Some of them wait in threads, some print what depends on hashes: whatever differs from run to run must not be ours."""


def programs(count: int) -> list[Program]:
    """The first ``count`` of an endless list; each family returns with other sizes."""
    found: list[Program] = []
    for index in range(count):
        name = list(FAMILIES)[index % len(FAMILIES)]
        rng = random.Random(index)
        words = " ".join(rng.choice("ab") * rng.randrange(1, 6) for _ in range(2000))
        found.append(Program(name, FAMILIES[name].format(n=rng.randrange(600, 2400)), words))
    return found
