"""The page as people use it, in a real browser, with a real service and the bundled model."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, ImageChops, ImageStat

from app.keys import ApiKey, digest_of, new_key
from tests.browser.conftest import AXE, PHONE, Service, look, running

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

# Enough steps to be interrupted, and too many to be finished by mistake.
LONG = 200
# What the browser does when a picture is pasted.
PASTE = """() => {
    const canvas = document.createElement("canvas");
    canvas.toBlob((blob) => {
        const clipboardData = new DataTransfer();
        clipboardData.items.add(new File([blob], "pasted.png", {type: "image/png"}));
        document.dispatchEvent(new ClipboardEvent("paste", {clipboardData, cancelable: true}));
    });
}"""


def pictures(page: Page) -> Locator:
    return page.locator("li.card[data-key]")


def waiting(page: Page) -> Locator:
    return page.locator("li.card.waiting")


def draw(page: Page, prompt: str, *, steps: int | None = None, seed: int | None = None) -> None:
    """Fill in the form and send it with the keyboard."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Steps", exact=True).fill("" if steps is None else str(steps))
    page.get_by_label("Seed", exact=True).fill("" if seed is None else str(seed))
    page.keyboard.press("Control+Enter")


def make_small(page: Page) -> None:
    """For jobs of many steps, each of which sends a picture: nobody looks at what they draw."""
    page.get_by_label("Width in pixels").fill("64")
    page.get_by_label("Height in pixels").fill("64")


def let_go(page: Page, held: list[Any]) -> None:
    """Let the page's question about the service pass, and wait until it has read the answer."""
    from playwright.sync_api import expect

    while not held:
        page.wait_for_timeout(10)
    held.pop().continue_()
    expect(page.get_by_label("Steps", exact=True)).to_have_attribute("placeholder", "4")


def image_of(page: Page, number: int = 0) -> Image.Image:
    """A picture of the gallery, as it is kept."""
    data = page.evaluate(
        """async (number) => {
            const image = document.querySelectorAll("li.card[data-key] img")[number];
            await image.decode();
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            canvas.getContext("2d").drawImage(image, 0, 0);
            return canvas.toDataURL().split(",")[1];
        }""",
        number,
    )
    return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")


def kept(page: Page) -> list[dict[str, Any]]:
    """What the browser keeps."""
    found: list[dict[str, Any]] = page.evaluate(
        """() => new Promise((resolve) => {
            indexedDB.open("fluxd").onsuccess = ({target}) => {
                const all = target.result.transaction("entries").objectStore("entries").getAll();
                all.onsuccess = () => resolve(all.result.map(
                    ({id, job, status, request, pictures}) =>
                        ({id, job, status, request, pictures: pictures.length})));
            };
        })"""
    )
    return found


def test_axe_is_there_where_this_runs_in_full() -> None:
    if AXE is None:
        pytest.skip("axe-playwright-python is not installed: no barriers are looked for")


def test_from_the_first_visit_to_a_picture_that_stays(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    here = visit(service.url)
    page = here.open()
    expect(page.locator("#model-text")).to_contain_text("fluxd-demo on")
    expect(page.get_by_text("It draws no photographs.")).to_be_visible()
    look(page, "first-visit")
    page.get_by_role("button", name="a blue star to the left of a yellow heart").click()
    expect(waiting(page)).to_be_visible()
    expect(pictures(page)).to_have_count(1)
    assert image_of(page).size == (256, 256)
    expect(page.locator("#announcer")).to_have_text(
        "Drawn: a blue star to the left of a yellow heart"
    )
    look(page, "first-picture")
    page.reload()
    expect(pictures(page)).to_have_count(1)
    # The pictures are the browser's own: they stay when the service forgets the job.
    (entry,) = kept(page)
    assert entry["status"] == "completed" and entry["request"]["priority"] == "interactive"


def test_answers_that_end_in_the_middle_are_asked_for_again(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    expect(page.locator("#model-text")).to_contain_text("fluxd-demo on")
    # What fetch does when the connection breaks below a body: once for each kind of answer.
    page.evaluate(
        """() => {
            for (const kind of ["json", "blob"]) {
                const whole = Response.prototype[kind];
                Response.prototype[kind] = function () {
                    Response.prototype[kind] = whole;
                    return Promise.reject(new TypeError("network error"));
                };
            }
            document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )
    expect(page.locator("#model-text")).to_have_text("Not connected")
    expect(page.locator("#model-text")).to_contain_text("fluxd-demo on")
    draw(page, "a red circle")
    expect(pictures(page)).to_have_count(1)


def test_a_picture_of_another_window_is_dropped_as_its_file(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    page.evaluate(
        """() => document.createElement("canvas").toBlob((blob) => {
            const dataTransfer = new DataTransfer();
            dataTransfer.setData("application/x-fluxd-picture", "of-another-window:7");
            dataTransfer.items.add(new File([blob], "dragged.png", {type: "image/png"}));
            document.dispatchEvent(new DragEvent("drop", {dataTransfer, cancelable: true}));
        })"""
    )
    expect(page.locator(".reference")).to_have_count(1)


def test_a_proxys_error_is_no_fault_of_the_service(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    expect(page.locator("#model-text")).to_contain_text("fluxd-demo on")
    page.route("**/health", lambda route: route.fulfill(status=502, body="Bad gateway"))
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#model-text")).to_have_text("Not connected")
    page.unroute("**/health")
    expect(page.locator("#model-text")).to_contain_text("fluxd-demo on")


def test_keyboard_alone_draws_looks_deletes_and_takes_back(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to the pictures")).to_be_focused()
    page.get_by_label("Prompt", exact=True).focus()
    page.keyboard.type("a red circle")
    page.keyboard.press("Control+Enter")
    expect(pictures(page)).to_have_count(1)
    page.get_by_label("Prompt", exact=True).fill("something else")
    page.get_by_label("Prompt", exact=True).press("Alt+ArrowUp")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a red circle")
    page.get_by_label("Prompt", exact=True).press("Alt+ArrowDown")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("something else")
    page.locator("li.card .open").focus()
    page.keyboard.press("Enter")
    viewer = page.get_by_role("dialog")
    expect(viewer).to_be_visible()
    expect(viewer.locator("dl")).to_contain_text("256 × 256")
    look(page, "viewer")
    page.keyboard.press("Delete")
    expect(pictures(page)).to_have_count(0)
    expect(viewer).to_be_hidden()
    look(page, "deleted")
    page.get_by_role("button", name="Undo").press("Enter")
    expect(pictures(page)).to_have_count(1)


def test_settings_reach_the_service_and_come_back(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    expect(page.get_by_label("Width in pixels")).to_have_value("256")
    page.get_by_text("Landscape").click()
    width = int(page.get_by_label("Width in pixels").input_value())
    height = int(page.get_by_label("Height in pixels").input_value())
    assert width > 256 > height and width % 16 == height % 16 == 0
    page.get_by_label("Width in pixels").fill("192")
    page.get_by_label("Height in pixels").fill("128")
    page.get_by_label("Pictures", exact=True).and_(page.locator("input")).fill("2")
    page.get_by_text("More", exact=True).click()
    page.get_by_label("Schedule").select_option("power")
    page.get_by_label("Exponent").fill("1.5")
    look(page, "all-settings")
    draw(page, "two green squares", steps=3, seed=41)
    expect(pictures(page)).to_have_count(2)
    (entry,) = kept(page)
    asked = {name: entry["request"][name] for name in entry["request"] if name != "previews"}
    assert asked == {
        "prompt": "two green squares",
        "width": 192,
        "height": 128,
        "steps": 3,
        "seed": 41,
        "n": 2,
        "schedule": "power",
        "power_alpha": 1.5,
        "priority": "interactive",
    }
    assert image_of(page).size == (192, 128)
    page.reload()
    page.locator("li.card .open").nth(1).click()
    facts = page.locator("dl")
    expect(facts).to_contain_text("power, exponent 1.5")
    expect(facts).to_contain_text("42")
    page.get_by_role("button", name="Use settings").click()
    expect(page.get_by_label("Seed", exact=True)).to_have_value("42")
    expect(page.get_by_label("Width in pixels")).to_have_value("192")
    expect(page.get_by_role("button", name="Keep the seed")).to_have_attribute(
        "aria-pressed", "true"
    )
    with page.expect_download() as started:
        page.locator("li.card").first.hover()
        page.locator("li.card").first.get_by_role("button", name="Download").click()
    assert started.value.suggested_filename == "two-green-squares-41.png"
    with Image.open(started.value.path()) as saved:
        assert saved.size == (192, 128)
        assert "Seed: 41" in saved.text["parameters"]  # type: ignore[attr-defined]


def test_what_cannot_be_is_said_next_to_its_field(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    page.get_by_role("button", name=re.compile("^Draw")).click()
    expect(page.locator("#prompt-error")).to_have_text("Say what should be drawn.")
    page.get_by_label("Prompt", exact=True).fill("a heart")
    page.get_by_label("Width in pixels").fill("250")
    page.get_by_label("Steps", exact=True).fill("500")
    page.get_by_role("button", name=re.compile("^Draw")).click()
    expect(page.locator("#size-error")).to_have_text(
        "Width must be a multiple of 16; got 250 (nearest: 240, 256)."
    )
    expect(page.locator("#steps-error")).to_have_text("Steps must be from 1 to 200; got 500.")
    expect(page.get_by_label("Width in pixels")).to_be_focused()
    look(page, "errors")
    page.locator("#reference-file").set_input_files(
        {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"words"}
    )
    expect(page.locator("#images-error")).to_contain_text("notes.txt is not a PNG")
    expect(pictures(page)).to_have_count(0)
    expect(waiting(page)).to_have_count(0)


def test_a_reference_is_changed_and_two_pictures_are_compared(
    service: Service, visit: Any, tmp_path: Path
) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    draw(page, "a large red circle on a white background", seed=5)
    expect(pictures(page)).to_have_count(1)
    page.locator("li.card").hover()
    page.get_by_role("button", name="Use as a reference").click()
    expect(page.locator(".reference")).to_have_count(1)
    expect(page.get_by_label("Width in pixels")).to_be_disabled()
    look(page, "reference")
    draw(page, "make it blue", seed=5)
    expect(pictures(page)).to_have_count(2)
    red, _, blue = image_of(page).getpixel((128, 128))  # type: ignore[misc]
    assert blue > 120 > red, "the circle in the middle is blue now"
    for number in (0, 1):
        page.locator("li.card").nth(number).hover()
        card = page.locator("li.card").nth(number)
        card.get_by_role("button", name="Compare with another").click()
    comparing = page.get_by_role("dialog")
    expect(comparing).to_contain_text("What differs")
    expect(comparing).to_contain_text("make it blue")
    look(page, "compare")
    comparing.get_by_role("slider").press("Home")
    page.keyboard.press("Escape")
    expect(comparing).to_be_hidden()
    # From a file, as it is dropped or pasted, too.
    image_of(page).save(tmp_path / "own.png")
    page.locator("#reference-file").set_input_files(tmp_path / "own.png")
    expect(page.locator(".reference")).to_have_count(2)
    page.get_by_role("button", name="Remove reference 2").click()
    expect(page.locator(".reference")).to_have_count(1)
    page.locator("li.card img").first.drag_to(page.locator("#add-reference"))
    expect(page.locator(".reference")).to_have_count(2)
    page.evaluate(PASTE)
    expect(page.locator(".reference")).to_have_count(3)


def test_only_the_marked_part_is_drawn_again(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    draw(page, "a large blue square on a white background", seed=3)
    expect(pictures(page)).to_have_count(1)
    page.locator("li.card .open").click()
    page.get_by_role("button", name="Change a part").click()
    canvas = page.get_by_role("application")
    expect(canvas).to_be_focused()
    for _ in range(6):
        page.keyboard.press("]")
    box = canvas.bounding_box()
    assert box is not None
    # A stroke over the right quarter with the pointer, and one more with the keys.
    x = box["x"] + box["width"] * 0.875
    page.mouse.move(x, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(x, box["y"] + box["height"] - 20, steps=8)
    page.mouse.up()
    page.keyboard.press("Space")
    for _ in range(4):
        page.keyboard.press("ArrowUp")
    page.keyboard.press("Space")
    look(page, "mask")
    page.keyboard.press("Control+z")
    page.get_by_role("button", name="Done").click()
    expect(page.get_by_alt_text("a part of it is marked")).to_be_visible()
    expect(page.get_by_text("keeps its size")).to_be_visible()
    look(page, "masked-reference")
    draw(page, "put it on a yellow background", seed=9)
    expect(pictures(page)).to_have_count(2)
    changed = ImageChops.difference(image_of(page, 0), image_of(page, 1))
    left, right = changed.crop((0, 0, 128, 256)), changed.crop((208, 32, 248, 224))
    assert max(ImageStat.Stat(left).mean) < 16 < 60 < max(ImageStat.Stat(right).mean)


def test_a_job_survives_a_reload_and_another_is_cancelled(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    make_small(page)
    draw(page, "a yellow star", steps=32)
    expect(waiting(page).locator(".standing")).to_contain_text(re.compile(r"Step \d+ of 32"))
    (before,) = kept(page)
    page.reload()
    expect(pictures(page)).to_have_count(1)
    (after,) = kept(page)
    assert (before["job"], before["pictures"]) == (after["job"], 0)
    assert (after["status"], after["pictures"]) == ("completed", 1)
    draw(page, "a pink heart", steps=LONG)
    expect(waiting(page).get_by_alt_text("What is coming")).to_be_visible()
    look(page, "drawing")
    waiting(page).get_by_role("button", name="Cancel").click()
    expect(waiting(page)).to_have_count(0)
    expect(page.locator("#announcer")).to_have_text("Cancelled")
    assert [entry["status"] for entry in kept(page)] == ["completed"]


def test_a_size_typed_before_the_service_is_known_is_kept(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    held: list[Any] = []
    page.route("**/health", lambda route: held.append(route))
    page.reload()
    make_small(page)
    let_go(page, held)
    expect(page.get_by_label("Width in pixels")).to_have_value("64")
    expect(page.get_by_label("Height in pixels")).to_have_value("64")
    # Nor is the model's own size put where somebody is about to type.
    page.reload()
    page.get_by_label("Width in pixels").focus()
    let_go(page, held)
    page.keyboard.type("64")
    expect(page.get_by_label("Width in pixels")).to_have_value("64")
    page.unroute("**/health")


def test_more_jobs_than_a_browser_has_connections_all_arrive(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    make_small(page)
    for number in range(8):
        draw(page, f"a blue circle {number}", steps=1)
    expect(pictures(page)).to_have_count(8)
    assert {entry["status"] for entry in kept(page)} == {"completed"}


def test_a_job_survives_the_end_of_the_service(service: Service, visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit(service.url).open()
    make_small(page)
    draw(page, "an orange arrow", steps=48)
    expect(waiting(page).locator(".standing")).to_contain_text("Step")
    service.stop(kill=True)
    expect(page.locator("#notice")).to_contain_text("does not answer")
    expect(waiting(page)).to_contain_text("Waiting for the service")
    look(page, "service-gone")
    # What is asked meanwhile is sent when it is back.
    draw(page, "a cyan ring")
    expect(waiting(page)).to_have_count(2)
    service.start()
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.get_by_label("The model is being loaded")).to_be_visible()
    look(page, "loading")
    expect(pictures(page)).to_have_count(2)


def test_a_wrong_key_a_full_queue_and_a_service_that_keeps_nothing(visit: Any) -> None:
    from playwright.sync_api import expect

    key = new_key()
    entry = ApiKey("alice", digest_of(key)).entry
    with running(api_keys=entry, data_dir="off", queue_limit="1", in_flight_limit="1") as service:
        page = visit(service.url, PHONE).open()
        expect(page.get_by_role("button", name="API key")).to_be_visible()
        draw(page, "a purple diamond", steps=LONG)
        asking = page.get_by_role("dialog")
        expect(asking).to_contain_text("An API key is required")
        asking.get_by_label("Key").fill("wrong")
        asking.get_by_role("button", name="Use this key").click()
        expect(asking.locator("#key-error")).to_contain_text("not known here")
        expect(asking.get_by_label("Key")).to_have_attribute("aria-invalid", "true")
        look(page, "wrong-key")
        asking.get_by_label("Key").fill(key)
        page.keyboard.press("Enter")
        expect(asking).to_be_hidden()
        # What was asked before goes on by itself.
        expect(waiting(page).locator(".standing")).to_contain_text("Step")
        draw(page, "a grey oval", steps=LONG)
        expect(waiting(page)).to_have_count(2)
        expect(waiting(page).first).to_contain_text(re.compile("in line|Next"))
        draw(page, "one too many")
        expect(page.locator("#form-error")).to_contain_text("Room is expected in")
        expect(waiting(page)).to_have_count(2)
        look(page, "full-queue")
        for _ in range(2):
            waiting(page).first.get_by_role("button", name="Cancel").click()
        expect(waiting(page)).to_have_count(0)
        draw(page, "a purple diamond")
        expect(pictures(page)).to_have_count(1)
        draw(page, "a grey oval", steps=LONG)
        expect(waiting(page).locator(".standing")).to_contain_text("Step")
        page.reload()
        expect(page.locator("li.card.failed")).to_contain_text("keeps no jobs")
        look(page, "lost")
        page.get_by_role("button", name="Try again").click()
        waiting(page).get_by_role("button", name="Cancel").click()
        expect(waiting(page)).to_have_count(0)


def test_nothing_is_fetched_from_elsewhere_and_the_form_is_there_at_once(
    service: Service, visit: Any
) -> None:
    from playwright.sync_api import expect

    here = visit(service.url)
    page = here.open()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    # Nothing of the service's answers is needed for the first paint.
    page.route("**/health", lambda route: None)
    page.route("**/v1/**", lambda route: None)
    page.reload()
    expect(page.get_by_label("Prompt", exact=True)).to_be_visible()
    expect(page.get_by_text("Connecting")).to_be_visible()
    assert asked and all(url.startswith(service.url) for url in asked)
