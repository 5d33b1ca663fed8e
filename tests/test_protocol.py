"""The lines between daemon and clients: written, read, and refused with the code that JSON-RPC asks for."""

from __future__ import annotations

import json
import re
import unittest

from tests import logs
from wfd import definition, protocol
from wfd.protocol import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    PARSE_ERROR,
    ProtocolError,
    Request,
)

# One lawful request for each method.
REQUESTS: dict[str, dict[str, object]] = {
    "hello": {"protocol_min": 1, "protocol_max": 1},
    "submit": {"run_id": "r1", "definition": {}, "base_dir": "/", "cwd": "/ü", "environment": {"env": {}}},
    "status": {"run_id": "r1"},
    "list": {},
    "cancel": {"run_id": "r1", "request": "q"},
    "retry": {"run_id": "r1", "request": "q"},
    "watch": {"run_id": "r1", "from_seq": 1},
    "shutdown": {"cancel_runs": True},
}
WRONG: dict[type, tuple[object, ...]] = {
    int: (True, 1.0, "1", None, [1]),
    str: (1, None, ["r1"], {}),
    dict: ([], "{}", None, 1),
    bool: (1, 0, "true", None),
}


def line(**record: object) -> bytes:
    return json.dumps({"jsonrpc": "2.0", "id": 1, **record}).encode()


class Requests(unittest.TestCase):
    def test_every_method_comes_back_as_it_was_sent(self) -> None:
        self.assertEqual(REQUESTS.keys(), protocol.PARAMS.keys())
        for method, params in REQUESTS.items():
            for request_id in (1, 0, -7, "q-1", "ü"):
                with self.subTest(method=method, id=request_id):
                    sent = protocol.request(method, params, request_id)
                    self.assertTrue(sent.endswith(b"\n") and sent.count(b"\n") == 1 and sent.isascii())
                    self.assertEqual(protocol.parse_request(sent[:-1]), Request(request_id, method, params))

    def test_without_an_id_it_is_a_notification(self) -> None:
        self.assertEqual(protocol.parse_request(b'{"jsonrpc":"2.0","method":"list"}'), Request(None, "list", {}))

    def test_optional_params_may_be_left_out(self) -> None:
        self.assertEqual(protocol.parse_request(line(method="shutdown", params={})), Request(1, "shutdown", {}))

    def assert_refused(self, raw: bytes, code: int, words: str, request_id: object = 1) -> None:
        with self.subTest(raw=raw[:80]):
            with self.assertRaises(ProtocolError) as caught:
                protocol.parse_request(raw)
            problem = caught.exception
            self.assertEqual((problem.code, problem.request_id), (code, request_id))
            self.assertIn(words, problem.message)
            answer = json.loads(protocol.error(problem.request_id, problem))
            self.assertEqual(answer, {"jsonrpc": "2.0", "id": request_id,
                                      "error": {"code": code, "message": problem.message}})  # fmt: skip

    def test_what_is_not_json(self) -> None:
        for raw in (b"", b"{", b"GET / HTTP/1.1\r", b"\xff", b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"[" * 100_000,
                    b'{"id":NaN}', b'{"id":Infinity}', b'{"id":' + b"9" * 5_000 + b"}"):  # fmt: skip
            self.assert_refused(raw, PARSE_ERROR, "not JSON", None)

    def test_what_is_no_request(self) -> None:
        for raw in (b"null", b"7", b'"list"', b"[]", b'[{"jsonrpc":"2.0","id":1,"method":"list"}]'):
            self.assert_refused(raw, INVALID_REQUEST, "not a JSON object", None)
        wrong_ids: tuple[object, ...] = (True, 1.5, [], {})
        for request_id in wrong_ids:
            self.assert_refused(line(id=request_id, method="list"), INVALID_REQUEST, "id must be", None)
        for other in (line(), line(method=7), line(method=None), line(method=["list"]), b'{"id":1,"method":"list"}',
                      line(method="list", jsonrpc="1.0"), line(method="list", jsonrpc=2.0)):  # fmt: skip
            self.assert_refused(other, INVALID_REQUEST, 'a "method"')

    def test_unknown_methods_are_told_the_known_ones(self) -> None:
        self.assert_refused(line(method="List"), METHOD_NOT_FOUND, "no method 'List'; there are hello, submit, status")

    def test_params(self) -> None:
        for params in ([], [1], None, "r1", 7):
            self.assert_refused(line(method="status", params=params), INVALID_PARAMS, "params must be an object")
        self.assert_refused(line(method="status"), INVALID_PARAMS, "the param 'run_id' is missing")
        for method, lawful in REQUESTS.items():
            self.assert_refused(line(method=method, params={**lawful, "x": 1}), INVALID_PARAMS, "unknown param 'x'")
            for name, (kind, is_optional) in protocol.PARAMS[method].items():
                rest = {other: value for other, value in lawful.items() if other != name}
                if not is_optional:
                    words = f"the param {name!r} is missing"
                    self.assert_refused(line(method=method, params=rest), INVALID_PARAMS, words)
                for value in WRONG[kind]:
                    words = f"the param {name!r} must be"
                    self.assert_refused(line(method=method, params={**rest, name: value}), INVALID_PARAMS, words)


class Answers(unittest.TestCase):
    def test_result(self) -> None:
        raw = protocol.result("q", {"state": "ü\n"})
        self.assertEqual(raw, b'{"jsonrpc":"2.0","id":"q","result":{"state":"\\u00fc\\n"}}\n')
        self.assertEqual(protocol.parse_message(raw[:-1])["result"], {"state": "ü\n"})

    def test_error(self) -> None:
        problem = ProtocolError(protocol.INVALID_DEFINITION, "no", {"problems": []})
        self.assertEqual(str(problem), "no")
        raw = protocol.error(3, problem)
        expected = b'{"jsonrpc":"2.0","id":3,"error":{"code":-32003,"message":"no","data":{"problems":[]}}}\n'
        self.assertEqual(raw, expected)
        self.assertEqual(protocol.parse_message(raw[:-1])["id"], 3)

    def test_an_event_passes_the_logs_line_on_byte_by_byte(self) -> None:
        log = logs.complete(logs.diamond())
        for written in log.lines:
            stored = logs.encode([written])
            raw = protocol.notifications("r1", stored)
            before, after = b'{"jsonrpc":"2.0","method":"event","params":{"run_id":"r1","line":', b"}}\n"
            self.assertEqual(raw, before + stored[:-1] + after)
            message = protocol.parse_message(raw[:-1])
            self.assertEqual(message["params"], {"run_id": "r1", "line": json.loads(stored)})
            self.assertNotIn("id", message)

    def test_what_is_no_message(self) -> None:
        cases = (
            (b"", PARSE_ERROR),
            (b"{", PARSE_ERROR),
            (b"[]", INVALID_REQUEST),
            (b"{}", INVALID_REQUEST),
            (b'{"id":1,"result":{}}', INVALID_REQUEST),
            (b'{"jsonrpc":"1.0","id":1,"result":{}}', INVALID_REQUEST),
            (b'{"jsonrpc":"2.0","id":1}', INVALID_REQUEST),
        )
        for raw, code in cases:
            with self.subTest(raw=raw):
                with self.assertRaises(ProtocolError) as caught:
                    protocol.parse_message(raw)
                self.assertEqual(caught.exception.code, code)


class Contract(unittest.TestCase):
    def test_codes_are_distinct_and_ours_lie_where_json_rpc_leaves_room(self) -> None:
        codes = [value for value in vars(protocol).values() if type(value) is int and value < 0]
        self.assertEqual(len(set(codes)), len(codes))
        given = {PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, protocol.INTERNAL_ERROR}
        self.assertEqual(given, {-32700, -32600, -32601, -32602, -32603})
        for code in set(codes) - given:
            self.assertIn(code, range(-32099, -31999))

    def test_the_docstring_lists_the_methods_that_there_are(self) -> None:
        documented = re.findall(r"^    ([a-z]+) +\{", protocol.__doc__ or "", re.MULTILINE)
        self.assertEqual(documented, list(protocol.PARAMS))

    def test_a_definition_fits_into_a_request(self) -> None:
        self.assertLess(definition.MAX_DEFINITION_BYTES, protocol.MAX_FRAME_BYTES)


if __name__ == "__main__":
    unittest.main()
