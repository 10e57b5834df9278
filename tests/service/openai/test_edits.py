"""``POST /v1/images/edits`` and ``/variations``: every shape in which clients send pictures."""

from __future__ import annotations

import base64
import io
import random
from functools import partial
from typing import Any

import httpx2
import pytest
from PIL import Image
from starlette.testclient import TestClient

from tests.service.conftest import Start, error_of
from tests.service.openai.conftest import (
    DATA_URL,
    JPEG,
    MASK,
    MASK_PICTURE,
    PICTURE,
    PNG,
    WEBP,
    Images,
    file_of,
    same,
)

FIELDS = {"prompt": "the same in winter", "seed": "3"}
Part = tuple[str, tuple[Any, ...]]


def edit(client: TestClient, *files: Part, path: str = "edits", **fields: str) -> httpx2.Response:
    return client.post(f"/v1/images/{path}", data={**FIELDS, **fields}, files=list(files))


def edited(client: TestClient, *files: Part, **fields: str) -> Images:
    return Images.of(client, edit(client, *files, **fields))


def edited_json(client: TestClient, **body: Any) -> Images:
    body = {"prompt": "the same in winter", "seed": 3, **body}
    return Images.of(client, client.post("/v1/images/edits", json=body))


def refusal(answer: httpx2.Response, status: int = 400) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    return error_of(answer)


IMAGE: Part = ("image", ("photo.png", PNG, "image/png"))
UNKNOWN: Part = ("attachment", ("photo.png", PNG, "image/png"))


def test_an_edit_has_its_pictures_size_and_sees_it(client: TestClient) -> None:
    made = edited(client, IMAGE)
    assert made.pictures[0].size == PICTURE.size
    assert made.body["data"][0]["seed"] == 3
    assert "b64_json" in made.body["data"][0]
    # 80x64 pixels are 5x4 tokens.
    assert made.body["usage"]["input_tokens_details"]["image_tokens"] == 20
    plain = client.post(
        "/v1/images/generations", json={"prompt": FIELDS["prompt"], "seed": 3, "size": "80x64"}
    )
    assert not same(Images.of(client, plain).pictures[0], made.pictures[0])


@pytest.mark.parametrize(
    "files",
    [
        [("image[]", ("a.png", PNG, "image/png"))],
        [("images", ("a.png", PNG, "image/png"))],
        [("images[]", ("a.png", PNG, "image/png"))],
        [("image[0]", ("a.png", PNG, "image/png"))],
        [("image", ("upload", PNG))],
        [("image", ("a.jpg", PNG, "image/jpeg"))],
        [("image", ("..\\..\\a.exe", PNG, "application/octet-stream"))],
        [("image", (None, PNG, "image/png"))],
        [("image", (None, DATA_URL))],
        [("image", (None, base64.b64encode(PNG).decode()))],
    ],
    ids=[
        "list of one",
        "plural",
        "plural list",
        "numbered",
        "no type",
        "another type",
        "another name",
        "no name",
        "data URL",
        "base64",
    ],
)
def test_one_picture_in_every_shape(client: TestClient, files: list[Part]) -> None:
    assert same(edited(client, *files).pictures[0], edited(client, IMAGE).pictures[0])


@pytest.mark.parametrize("data", [JPEG, WEBP], ids=["jpeg", "webp"])
def test_the_bytes_say_what_they_are(client: TestClient, data: bytes) -> None:
    named = edited(client, ("image", ("a.png", data, "image/png")))
    nameless = edited(client, ("image", (None, data, "text/plain")))
    assert same(named.pictures[0], nameless.pictures[0])


@pytest.mark.parametrize(
    "names", [("image", "image"), ("image[]", "image[]"), ("image[0]", "image[1]")]
)
def test_several_pictures_keep_their_order(client: TestClient, names: tuple[str, str]) -> None:
    other = file_of(Image.effect_noise((64, 64), 90).convert("RGB"))

    def parts(*order: bytes) -> list[Part]:
        return [(name, ("a", data)) for name, data in zip(names, order, strict=True)]

    made = edited(client, *parts(PNG, other))
    assert made.pictures[0].size == PICTURE.size
    assert made.body["usage"]["input_tokens_details"]["image_tokens"] == 20 + 16
    assert edited(client, *parts(other, PNG)).pictures[0].size == (64, 64)


def test_a_mask_says_what_is_drawn_again(client: TestClient) -> None:
    mask: Part = ("mask", ("mask.png", MASK, "image/png"))
    masked = edited(client, IMAGE, mask)
    assert masked.pictures[0].size == PICTURE.size
    assert not same(masked.pictures[0], edited(client, IMAGE).pictures[0])
    native = client.post(
        "/v1/generate",
        json={
            "prompt": FIELDS["prompt"],
            "seed": 3,
            "images": [DATA_URL],
            "mask": base64.b64encode(MASK).decode(),
        },
    ).json()
    assert masked.body["data"][0]["b64_json"] == native["images"][0]["b64"]


def test_a_masked_picture_is_brought_to_the_size_asked_for(client: TestClient) -> None:
    mask: Part = ("mask", ("mask.png", MASK))
    assert edited(client, IMAGE, mask, size="160x128").pictures[0].size == (160, 128)
    assert edited(client, IMAGE, mask, size="auto").pictures[0].size == (80, 64)
    error = refusal(edit(client, IMAGE, mask, size="128x128"))
    assert error["param"] == "size"
    assert "proportions of the first image, 80x64; got 128x128" in error["message"]
    error = refusal(edit(client, IMAGE, mask, size="1280x1024"))
    assert "at most 1024x1024 pixels in area" in error["message"]


def test_a_size_holds_without_a_mask(client: TestClient) -> None:
    assert edited(client, IMAGE, size="64x96").pictures[0].size == (64, 96)


def test_every_field_arrives_as_text(client: TestClient) -> None:
    made = edited(
        client,
        IMAGE,
        n="2",
        size="64x64",
        quality="low",
        output_format="webp",
        output_compression="70",
        num_inference_steps="2",
        guidance_scale="1.5",
        response_format="url",
        stream="false",
        background="auto",
        input_fidelity="high",
        user="somebody",
        made_up="thing",
    )
    assert [picture.format for picture in made.pictures] == ["WEBP", "WEBP"]
    assert made.body["quality"] == "low"
    assert all("url" in item for item in made.body["data"])
    as_json = edited_json(
        client,
        images=[{"image_url": DATA_URL}],
        n=2,
        size="64x64",
        output_format="webp",
        output_compression=70,
        num_inference_steps=2,
    )
    assert same(made.pictures[1], as_json.pictures[1])


@pytest.mark.parametrize("model", ["dall-e-3", "gpt-image-1", None])
def test_edits_bring_bytes_unless_addresses_are_asked_for(
    client: TestClient, model: str | None
) -> None:
    fields = {} if model is None else {"model": model}
    assert "b64_json" in edited(client, IMAGE, **fields).body["data"][0]


def test_an_empty_field_is_an_absent_one(client: TestClient) -> None:
    empty = dict.fromkeys(("size", "quality", "n", "mask", "background", "response_format"), "")
    nothing: Part = ("mask", ("", b"", "application/octet-stream"))
    assert same(
        edited(client, IMAGE, nothing, **empty).pictures[0], edited(client, IMAGE).pictures[0]
    )


def test_a_text_part_may_be_large(client: TestClient) -> None:
    large = Image.frombytes("RGB", (512, 528), random.Random(0).randbytes(512 * 528 * 3))
    text = base64.b64encode(file_of(large)).decode()
    assert len(text) > 1024 * 1024
    assert edited(client, ("image", (None, text)), size="64x64").pictures


@pytest.mark.parametrize(
    "pictures",
    [
        {"images": [{"image_url": DATA_URL}]},
        {"images": [{"image_url": {"url": DATA_URL}}]},
        {"images": [{"image_url": DATA_URL, "file_id": None}]},
        {"images": [DATA_URL]},
        {"image": DATA_URL},
        {"image": [DATA_URL]},
        {"image": {"image_url": DATA_URL}},
        {"image": base64.b64encode(PNG).decode(), "images": None},
    ],
)
def test_pictures_inside_json(client: TestClient, pictures: dict[str, Any]) -> None:
    assert same(edited_json(client, **pictures).pictures[0], edited(client, IMAGE).pictures[0])


def test_a_mask_inside_json(client: TestClient) -> None:
    url = f"data:image/png;base64,{base64.b64encode(MASK).decode()}"
    by_form = edited(client, IMAGE, ("mask", ("mask.png", MASK)))
    for mask in ({"image_url": url}, url):
        made = edited_json(client, images=[{"image_url": DATA_URL}], mask=mask)
        assert same(made.pictures[0], by_form.pictures[0])


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({}, "image", "missing_required_parameter"),
        ({"images": []}, "image", "missing_required_parameter"),
        ({"images": [{}]}, "images[0].image_url", "missing_required_parameter"),
        ({"images": [{"file_id": "f"}]}, "images[0].file_id", "invalid_value"),
        ({"images": [{"image_url": "https://a/b.png"}]}, "images[0]", "invalid_value"),
        ({"images": [DATA_URL], "mask": {}}, "mask.image_url", "missing_required_parameter"),
        ({"images": [DATA_URL], "mask": "x"}, "mask", "invalid_value"),
        ({"images": [5]}, "images[0]", "invalid_value"),
        ({"image": {"image_url": 5}}, "images[0]", "invalid_value"),
        ({"images": [DATA_URL] * 11}, "images", "invalid_value"),
    ],
)
def test_what_is_no_picture_inside_json_is_named(
    client: TestClient, body: dict[str, Any], param: str, code: str
) -> None:
    error = refusal(client.post("/v1/images/edits", json={"prompt": "x", **body}))
    assert (error["param"], error["code"]) == (param, code)


def test_what_is_wrong_with_a_form_is_named(client: TestClient) -> None:
    error = refusal(edit(client, UNKNOWN))
    assert (error["code"], error["param"]) == ("missing_required_parameter", "image")
    error = refusal(edit(client, IMAGE, prompt=""))
    assert (error["code"], error["param"]) == ("missing_required_parameter", "prompt")
    error = refusal(edit(client, IMAGE, ("prompt", ("p.txt", b"a fox")), prompt=""))
    assert error["param"] == "prompt" and "came as a file" in error["message"]
    error = refusal(edit(client, IMAGE, ("n", (None, b"1")), n="2"))
    assert error["param"] == "n" and "once" in error["message"]
    error = refusal(edit(client, IMAGE, n="many"))
    assert error["param"] == "n" and "valid integer" in error["message"]
    error = refusal(edit(client, IMAGE, stream="perhaps"))
    assert error["param"] == "stream"
    error = refusal(edit(client, IMAGE, ("image", ("b.png", b"no picture"))))
    assert error["param"] == "image[1]" and "is not a PNG, JPEG or WebP" in error["message"]
    small = file_of(Image.new("RGB", (32, 32)))
    error = refusal(edit(client, IMAGE, ("image", ("b.png", small))))
    assert error["param"] == "image[1]" and error["message"].startswith("image[1] must be at least")
    error = refusal(edit(client, ("image", ("b.png", b""))))
    assert error["param"] == "image[0]" and "is empty" in error["message"]
    error = refusal(edit(client, IMAGE, ("mask", ("m.png", PNG)), ("mask", ("m.png", PNG))))
    assert error["param"] == "mask" and "once" in error["message"]
    other = Image.new("RGBA", (64, 64))
    error = refusal(edit(client, IMAGE, ("mask", ("m.png", file_of(other)))))
    assert error["param"] == "mask" and "size of the first reference" in error["message"]
    opaque = MASK_PICTURE.copy()
    opaque.putalpha(255)
    error = refusal(edit(client, IMAGE, ("mask", ("m.png", file_of(opaque)))))
    assert error["param"] == "mask" and "marks nothing" in error["message"]


BOUNDARY = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x--"),
        (BOUNDARY, b""),
        (BOUNDARY, b"no part"),
        (BOUNDARY, b"--x\r\n\r\n\r\n--x--"),
        (BOUNDARY, b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--"),
        (BOUNDARY, b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na fox'),
        (BOUNDARY, b"--x\r\n" + b"A: b\r\n" * 5000),
        (f"multipart/form-data; boundary={'x' * 300}", b"--x--"),
        (
            BOUNDARY,
            b"".join(
                b'--x\r\nContent-Disposition: form-data; name="f%d"\r\n\r\na\r\n' % i
                for i in range(500)
            )
            + b"--x--",
        ),
    ],
)
def test_a_broken_form_is_refused_in_the_one_shape(
    client: TestClient, content_type: str, body: bytes
) -> None:
    answer = client.post("/v1/images/edits", content=body, headers={"Content-Type": content_type})
    assert refusal(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("missing", [1, 3, 8, 30, 200])
def test_a_form_that_is_cut_is_not_taken_for_a_whole_one(client: TestClient, missing: int) -> None:
    """Else a reference, or the steps that were asked for, would be left out without a word."""
    field = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    file = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n'
    whole = field % (b"prompt", b"a fox") + file % IMAGE[1][1] + b"--x--"
    for path in ("/v1/images/edits", "/v1/generate"):
        sent = {"headers": {"Content-Type": BOUNDARY}}
        assert client.post(path, content=whole, **sent).status_code == 200
        assert client.post(path, content=whole + b"\r\n", **sent).status_code == 200
        error = refusal(client.post(path, content=whole[:-missing], **sent))
        assert "cut short" in error["message"]


@pytest.mark.parametrize("charset", ["undefined", "punycode", "unicode_escape", "nonsense", "\xe9"])
def test_text_of_a_form_is_utf_8(client: TestClient, charset: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\\ud800\r\n--x--\r\n'
    for parameter in (f"charset={charset}", f'CHARSET="{charset}"'):
        sent = {"Content-Type": f"{BOUNDARY}; {parameter}".encode("latin-1")}
        refusal(client.post("/v1/generate", content=body, headers=sent))
    for charset in ("utf-8", "UTF-8"):
        sent = {"Content-Type": f"{BOUNDARY}; charset={charset}".encode()}
        assert client.post("/v1/generate", content=body, headers=sent).status_code == 200


def test_text_of_a_form_is_not_guessed_at(client: TestClient) -> None:
    """Read as latin-1, another prompt than the one that was meant would be drawn."""
    field = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n--x--\r\n'
    ask = partial(client.post, "/v1/generate", headers={"Content-Type": BOUNDARY})
    for name in ("prompt", "negative_prompt", "nonsense"):
        error = refusal(ask(content=field % (name.encode(), "a café".encode("latin-1"))))
        assert error["param"] == name and "UTF-8; byte 5" in error["message"]
    first = (field % (b"prompt", b"a fox")).removesuffix(b"--x--\r\n")
    for charset, written in (("us-ascii", "utf-8"), ("ISO-8859-1", "latin-1")):
        sent = {"Content-Type": f"{BOUNDARY}; charset={charset}"}
        body = first + field % (b"negative_prompt", "a café".encode(written))
        answer = client.post("/v1/generate", content=body, headers=sent)
        assert answer.json()["params"]["negative_prompt"] == "a café"


def test_another_type_is_refused(client: TestClient) -> None:
    for path, allowed in (
        ("edits", "application/json or multipart/form-data"),
        ("variations", "multipart/form-data"),
    ):
        answer = client.post(
            f"/v1/images/{path}",
            content=b"prompt=x",
            headers={"Content-Type": "application/x-www-form-urlencoded"},
        )
        assert f"Content-Type must be {allowed}; got" in refusal(answer, 415)["message"]


def test_a_variation_needs_no_prompt(client: TestClient) -> None:
    answer = client.post("/v1/images/variations", data={"n": "2", "seed": "1"}, files=[IMAGE])
    made = Images.of(client, answer)
    assert [picture.size for picture in made.pictures] == [PICTURE.size] * 2
    # The older contract: addresses, unless the model or the client says otherwise.
    assert all("url" in item for item in made.body["data"])
    as_text = edit(client, IMAGE, path="variations", response_format="b64_json")
    assert "b64_json" in Images.of(client, as_text).body["data"][0]
    error = refusal(edit(client, IMAGE, ("mask", ("m", MASK)), path="variations"))
    assert error["param"] == "mask"
    error = refusal(edit(client, UNKNOWN, path="variations"))
    assert error["code"] == "missing_required_parameter"


@pytest.mark.parametrize("path", ["edits", "variations"])
def test_the_prefix_may_be_left_out(client: TestClient, path: str) -> None:
    answer = client.post(f"/images/{path}", data=FIELDS, files=[IMAGE])
    assert Images.of(client, answer).pictures


def test_references_can_be_forbidden(start: Start) -> None:
    error = refusal(edit(start(max_references=0), IMAGE))
    assert "at most 0 images are allowed" in error["message"]


def test_a_form_larger_than_the_setting_is_refused(start: Start) -> None:
    large = io.BytesIO(b"\0" * 4096)
    answer = edit(start(max_body_bytes=2048), ("image", ("a.png", large)))
    assert refusal(answer, 413)["code"] == "body_too_large"
