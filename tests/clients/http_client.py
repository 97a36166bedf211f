"""What the HTTP client of Python's own library makes of a server: many exchanges on one connection, in all its ways.

    http_client.py ADDRESS PORT

Prints how many exchanges were right. What the origin heard is for the caller to compare: body number N is N, N times.
"""

import http.client
import sys


def body(number):
    return (str(number) * number).encode()


def exchange(connection, method, path, sent=None, fields=None, chunked=False):
    connection.request(method, path, sent, fields or {}, encode_chunked=chunked)
    answer = connection.getresponse()
    content = answer.read()
    expected = b"" if method == "HEAD" else b"ok"
    assert (answer.status, content) == (200, expected), (method, path, answer.status, content)
    assert not answer.will_close, (method, path)


def main(address, port):
    connection = http.client.HTTPConnection(address, int(port), timeout=10)
    count = 0
    for number in range(1, 101):
        path = f"/python/{number}"
        if number % 4 == 0:
            # Pieces of an iterable, of which the library knows no length.
            pieces = [body(number)[at:at + 7] for at in range(0, len(body(number)), 7)]
            exchange(connection, "POST", path, iter(pieces), {"Transfer-Encoding": "chunked"}, chunked=True)
        elif number % 4 == 1:
            exchange(connection, "PUT", path, body(number))
        elif number % 4 == 2:
            exchange(connection, "GET", path, None, {"X-Long": "x" * 5000})
        else:
            exchange(connection, "HEAD", path)
        count += 1
    connection.close()
    # One that ends its request by closing its half of nothing: HTTP/1.0.
    connection = http.client.HTTPConnection(address, int(port), timeout=10)
    connection._http_vsn, connection._http_vsn_str = 10, "HTTP/1.0"
    connection.request("GET", "/python/101")
    answer = connection.getresponse()
    assert answer.read() == b"ok" and answer.will_close
    print(count + 1)


main(*sys.argv[1:])
