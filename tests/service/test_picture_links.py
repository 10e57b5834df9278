"""Addresses of pictures: what they are made of, how long they work, how much they hold."""

from __future__ import annotations

import re

import pytest

from app.api.picture_links import PictureLinks
from app.engine import PackedPicture, PictureFormat
from app.errors import NotFoundError
from app.keys import ApiKey, digest_of, new_key
from tests.service.conftest import Start, StartLive, error_of


class Clock:
    """Seconds that a test moves."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def picture(size: int = 10, picture_format: PictureFormat = "png") -> PackedPicture:
    return PackedPicture(bytes(size), picture_format, 0, 64, 64)


def is_there(links: PictureLinks, name: str) -> bool:
    try:
        links.find(name)
    except NotFoundError:
        return False
    return True


def test_a_name_is_long_and_new_each_time_and_ends_as_its_file() -> None:
    links = PictureLinks(1000, 60)
    names = [links.keep(picture()) for _ in range(50)]
    assert len(set(names)) == 50
    assert all(re.fullmatch(r"[\w-]{32}\.png", name) for name in names)
    assert links.keep(picture(picture_format="jpeg")).endswith(".jpg")
    assert links.keep(picture(picture_format="webp")).endswith(".webp")


def test_a_name_works_for_its_time() -> None:
    clock = Clock()
    links = PictureLinks(1000, 60, clock)
    name = links.keep(picture())
    clock.now_s += 59
    assert links.find(name) == (bytes(10), "png", 1)
    clock.now_s += 1
    assert not is_there(links, name)
    assert links.kept_bytes == 0


def test_the_oldest_make_room() -> None:
    links = PictureLinks(25, 60)
    first, second, third = (links.keep(picture(10)) for _ in range(3))
    assert [is_there(links, name) for name in (first, second, third)] == [False, True, True]
    assert links.kept_bytes == 20
    # Larger than all the room there is: the one that was just asked for must be there.
    large = links.keep(picture(100))
    assert [is_there(links, name) for name in (second, third, large)] == [False, False, True]
    links.keep(picture(10))
    assert links.kept_bytes == 10


BODY = {"prompt": "x", "size": "64x64", "response_format": "url"}


@pytest.mark.parametrize(
    ("headers", "begins"),
    [
        ({"Host": "localhost:7861"}, "http://localhost:7861/files/"),
        ({"Host": "[::1]:7861"}, "http://[::1]:7861/files/"),
        # What a stranger says of a proxy is not believed.
        (
            {"Host": "localhost", "X-Forwarded-Host": "a.example", "X-Forwarded-Proto": "https"},
            "http://localhost/files/",
        ),
    ],
)
def test_an_address_begins_as_the_clients_own(
    start: Start, headers: dict[str, str], begins: str
) -> None:
    answer = start().post("/v1/images/generations", json=BODY, headers=headers)
    url = answer.json()["data"][0]["url"]
    assert url.startswith(begins)
    assert re.fullmatch(r"[\w-]{32}\.png", url.removeprefix(begins))


def test_a_picture_needs_no_key_but_its_address(start_live: StartLive) -> None:
    key = new_key()
    entry = ApiKey("tester", digest_of(key)).entry
    live = start_live(settings={"api_keys": (entry,), "trusted_proxies": ("127.0.0.1",)})
    forwarded = {"X-Forwarded-Host": "localhost", "X-Forwarded-Proto": "https"}
    with live.client() as client:
        assert client.post("/v1/images/generations", json=BODY).status_code == 401
        answer = client.post(
            "/v1/images/generations",
            json=BODY,
            headers={"Authorization": f"Bearer {key}", **forwarded},
        )
        url = answer.json()["data"][0]["url"]
        assert url.startswith("https://localhost/files/")
        found = client.get(url.removeprefix("https://localhost"))
    assert found.status_code == 200
    assert found.headers["cross-origin-resource-policy"] == "cross-origin"


def test_a_picture_is_served_as_what_it_is(start: Start) -> None:
    client = start(picture_link_lifetime_s=30)
    answer = client.post("/v1/images/generations", json={**BODY, "output_format": "jpeg"})
    url = answer.json()["data"][0]["url"]
    fetched, head = client.get(url), client.head(url)
    assert fetched.content.startswith(b"\xff\xd8\xff")
    for found in (fetched, head):
        assert found.headers["content-type"] == "image/jpeg"
        assert found.headers["content-length"] == str(len(fetched.content))
        assert found.headers["x-content-type-options"] == "nosniff"
        seconds = re.fullmatch(r"private, immutable, max-age=(\d+)", found.headers["cache-control"])
        assert seconds is not None and 0 < int(seconds[1]) <= 30
    assert head.content == b""


@pytest.mark.parametrize("name", ["nothing.png", "..%2f..%2fetc%2fpasswd", "%00"])
def test_a_guessed_name_finds_nothing(start: Start, name: str) -> None:
    answer = start().get(f"/files/{name}")
    assert (answer.status_code, error_of(answer)["code"]) == (404, "not_found")
