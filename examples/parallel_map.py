"""A parallel map, the shortest way and the usual way: how many primes are there in each stretch of numbers?

Prints the number of primes below 400,000, found twice, and that plain ``map`` finds the same::

    zmqsched.map: 33860 primes below 400000
    client.map:   33860 primes below 400000
    the same as map() finds, stretch by stretch: True
"""

import zmqsched

LIMIT = 400_000
STRETCH = 10_000


def count_primes(start: int, stop: int) -> int:
    """How many numbers of ``range(start, stop)`` are prime; a sieve of that stretch alone."""
    prime = bytearray(b"\x01") * (stop - start)
    for number in range(start, min(stop, 2)):
        prime[number - start] = 0
    for factor in range(2, int(stop**0.5) + 1):
        first = max(factor * factor, -(-start // factor) * factor)
        for multiple in range(first, stop, factor):
            prime[multiple - start] = 0
    return sum(prime)


def main() -> None:
    starts = range(0, LIMIT, STRETCH)
    stops = [start + STRETCH for start in starts]

    # One line, nothing to set up: a cluster is found or started, and ends with the program.
    counts = zmqsched.map(count_primes, starts, stops)
    print(f"zmqsched.map: {sum(counts)} primes below {LIMIT}")

    # A client is a concurrent.futures.Executor: map gives results as they come, in order; chunksize puts several
    # short calls into one task.
    with zmqsched.LocalCluster(2) as cluster, zmqsched.Client(cluster) as client:
        again = list(client.map(count_primes, starts, stops, chunksize=4))
    print(f"client.map:   {sum(again)} primes below {LIMIT}")

    print("the same as map() finds, stretch by stretch:", counts == again == list(map(count_primes, starts, stops)))


if __name__ == "__main__":
    main()
