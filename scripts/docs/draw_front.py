"""The picture at the top of README: what the embedded checkpoint does with drawings, every answer computed here.

    python scripts/docs/draw_front.py            # writes docs/img/front.png

It shows drawings that the checkpoint names right, in several languages; a sketch of a few strokes with the pictures it
finds; and what the pooling head looks at. Which drawings are shown is chosen among those that come out right: what it
gets wrong is in docs/default_checkpoint.md. Needs Chromium with its driver (Debian: chromium, chromium-driver,
fonts-noto-cjk) and the extra `dev`.
"""

from __future__ import annotations

import base64
import html
import io
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from transformers import AutoModel, AutoProcessor

import siglip_hf
from siglip_hf.inference.pooling_map import draw_heat_map
from siglip_hf.preprocessing.image_intake import load_picture

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "src" / "siglip_hf" / "apps" / "pictures"
OUT = ROOT / "docs" / "img" / "front.png"
WIDTH, HEIGHT = 1200, 560
SHOWN = 8
# The demo's labels in some of the ten languages, in one order.
LABELS = {
    "English": "cat, dog, tiger, penguin, turtle, frog, octopus, whale, pizza, hamburger, banana, strawberry, watermelon, "
    "doughnut, rocket, bicycle, helicopter, sailboat, guitar, umbrella, key, light bulb, house, cactus",
    "Deutsch": "Katze, Hund, Tiger, Pinguin, Schildkröte, Frosch, Krake, Wal, Pizza, Hamburger, Banane, Erdbeere, "
    "Wassermelone, Donut, Rakete, Fahrrad, Hubschrauber, Segelboot, Gitarre, Regenschirm, Schlüssel, Glühbirne, Haus, Kaktus",
    "Français": "chat, chien, tigre, pingouin, tortue, grenouille, pieuvre, baleine, pizza, hamburger, banane, fraise, "
    "pastèque, donut, fusée, vélo, hélicoptère, voilier, guitare, parapluie, clé, ampoule, maison, cactus",
    "한국어": "고양이, 개, 호랑이, 펭귄, 거북이, 개구리, 문어, 고래, 피자, 햄버거, 바나나, 딸기, 수박, 도넛, 로켓, 자전거, "
    "헬리콥터, 돛단배, 기타, 우산, 열쇠, 전구, 집, 선인장",
    "日本語": "猫, 犬, 虎, ペンギン, 亀, 蛙, タコ, クジラ, ピザ, ハンバーガー, バナナ, いちご, スイカ, ドーナツ, ロケット, 自転車, "
    "ヘリコプター, ヨット, ギター, 傘, 鍵, 電球, 家, サボテン",
    "中文": "猫, 狗, 老虎, 企鹅, 海龟, 青蛙, 章鱼, 鲸鱼, 披萨, 汉堡, 香蕉, 草莓, 西瓜, 甜甜圈, 火箭, 自行车, 直升机, 帆船, "
    "吉他, 雨伞, 钥匙, 灯泡, 房子, 仙人掌",
    "Español": "gato, perro, tigre, pingüino, tortuga, rana, pulpo, ballena, pizza, hamburguesa, plátano, fresa, sandía, "
    "dónut, cohete, bicicleta, helicóptero, velero, guitarra, paraguas, llave, bombilla, casa, cactus",
    "Русский": "кошка, собака, тигр, пингвин, черепаха, лягушка, осьминог, кит, пицца, гамбургер, банан, клубника, арбуз, "
    "пончик, ракета, велосипед, вертолёт, парусник, гитара, зонт, ключ, лампочка, дом, кактус",
}
# Sketches on a board of 100 x 100, as on the page "search": strokes of a coloured brush, (colour, width, points).
SKETCHES = {
    "watermelon": [("#d8342c", 44, [(30, 46), (50, 54), (70, 46)]), ("#2f8f3a", 9, [(12, 50), (24, 70), (50, 80), (76, 70), (88, 50)]),
                   ("#111111", 4, [(40, 52), (41, 54)]), ("#111111", 4, [(58, 56), (59, 58)]), ("#111111", 4, [(66, 46), (67, 48)])],
    "cactus": [("#2f8f3a", 20, [(50, 88), (50, 20)]), ("#2f8f3a", 13, [(50, 62), (24, 60), (24, 36)]),
               ("#2f8f3a", 13, [(50, 50), (76, 48), (76, 28)])],
    "strawberry": [("#d8342c", 40, [(38, 44), (62, 44), (50, 66), (38, 44)]), ("#2f8f3a", 10, [(30, 26), (50, 30), (70, 26)])],
    "banana": [("#f2c21a", 18, [(24, 24), (32, 48), (52, 66), (78, 70)])],
    "house": [("#c9a06a", 40, [(35, 66), (65, 66)]), ("#b5402c", 14, [(16, 46), (50, 18), (84, 46)]), ("#5a3a1a", 12, [(50, 78), (50, 64)])],
}  # fmt: skip


def sketch(strokes: list) -> Image.Image:
    """The strokes on white."""
    board = Image.new("RGB", (400, 400), "white")
    pen = ImageDraw.Draw(board)
    for colour, width, points in strokes:
        line = [(4 * x, 4 * y) for x, y in points]
        pen.line(line, fill=colour, width=4 * width, joint="curve")
        for x, y in line:  # round ends
            pen.ellipse((x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width), fill=colour)
    return board


def image(name: str) -> Image.Image:
    """A drawing of the demo on white."""
    return load_picture(PICTURES / f"{name}.png")


def as_data(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@torch.inference_mode()
def answers() -> tuple[list[tuple[str, str, str]], str, list[str], list[str]]:
    """(picture, language, its right label) of some, the sketch's name, what it finds, and pictures with clear maps."""
    folder = siglip_hf.default_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).float().eval(), AutoProcessor.from_pretrained(folder)
    names = [name.replace(" ", "_") for name in LABELS["English"].split(", ")]
    pictures = [image(name) for name in names]

    def encode(images: list[Image.Image]) -> torch.Tensor:
        return model.encode_image(processor(images=images, return_tensors="pt")["pixel_values"])

    images = encode(pictures)
    right: dict[str, set[str]] = {}
    labels = {language: line.split(", ") for language, line in LABELS.items()}
    for language, line in labels.items():
        best = (images @ model.encode_text(processor(text=line, return_tensors="pt")["input_ids"]).T).argmax(dim=1)
        right[language] = {
            name for name, found, place in zip(names, best, range(len(names)), strict=True) if found == place
        }
        print(f"{language}: {len(right[language])} of {len(names)} right")
    shown: list[tuple[str, str, str]] = []
    for number in range(SHOWN):
        language = list(labels)[number % len(labels)]
        free = [name for name in names if name in right[language] and name not in {one[0] for one in shown}]
        name = free[(5 * number) % len(free)]
        shown.append((name, language, labels[language][names.index(name)]))
    for name, strokes in SKETCHES.items():
        order = (encode([sketch(strokes)]) @ images.T)[0].argsort(descending=True)
        print(f"sketch of {name}: finds", ", ".join(names[place] for place in order[:4]))
        if names[order[0]] == name:
            return shown, name, [names[place] for place in order[:4]], [one[0] for one in shown[:3]]
    raise SystemExit("no sketch finds its picture; draw better ones in SKETCHES")


def page(shown: list[tuple[str, str, str]], drawn: str, found: list[str], looked: list[str]) -> str:
    """The picture as HTML."""
    folder = siglip_hf.default_checkpoint()
    model, processor = AutoModel.from_pretrained(folder).float().eval(), AutoProcessor.from_pretrained(folder)

    maps = siglip_hf.pooling_attention(
        model, dict(processor(images=[image(name) for name in looked], return_tensors="pt"))
    )
    cards = "".join(
        f'<figure><img src="{as_data(image(name))}"><figcaption>{html.escape(label)}<small>{language}</small></figcaption>'
        "</figure>"
        for name, language, label in shown
    )
    finds = "".join(f'<img src="{as_data(image(name))}">' for name in found)
    heat = "".join(
        f'<img src="{as_data(image(name))}"><img class="map" src="{as_data(draw_heat_map(image(name), attention))}">'
        for name, attention in zip(looked, maps, strict=True)
    )
    return f"""<!doctype html><meta charset="utf-8"><style>
      body {{ margin: 0; padding: 22px 26px; width: {WIDTH - 52}px; font: 17px "Noto Sans CJK KR", sans-serif;
              color: #1c2330; background: #f4f6fa; }}
      h2 {{ font-size: 17px; margin: 0 0 10px; font-weight: 600; }}
      section {{ background: white; border: 1px solid #d9dee8; border-radius: 12px; padding: 14px 18px; }}
      .row {{ display: flex; gap: 12px; }} .two {{ display: flex; gap: 18px; margin-top: 18px; }}
      .two section {{ flex: 1; }} figure {{ margin: 0; flex: 1; text-align: center; }}
      img {{ width: 100px; height: 100px; border-radius: 8px; }} figure img {{ width: 122px; height: 122px; }}
      figcaption {{ color: #1b7f4b; font-weight: 600; line-height: 1.25; white-space: nowrap; }}
      small {{ display: block; color: #6b7485; font-weight: 400; font-size: 13px; }}
      .sketch {{ border: 2px solid #1c2330; box-sizing: border-box; }} .arrow {{ align-self: center; font-size: 26px; }}
      .found {{ display: flex; gap: 8px; }} .found img {{ width: 86px; height: 86px; align-self: center; }}
      .looks img {{ width: 84px; height: 84px; }} .looks {{ gap: 6px; }}
    </style>
    <section><h2>Drawings and their best label of 24, in eight of its ten languages</h2>
      <div class="row">{cards}</div></section>
    <div class="two">
      <section><h2>A sketch finds its picture</h2><div class="row">
        <img class="sketch" src="{as_data(sketch(SKETCHES[drawn]))}"><span class="arrow">→</span>
        <div class="found">{finds}</div></div></section>
      <section><h2>Where the image tower looks</h2><div class="row looks">{heat}</div></section>
    </div>"""


def main() -> int:
    """Computes, draws and writes."""
    text = page(*answers())
    options = webdriver.ChromeOptions()
    for argument in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "hide-scrollbars",
                     f"window-size={WIDTH},{HEIGHT}"):  # fmt: skip
        options.add_argument(f"--{argument}")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "front.html")
        file.write_text(text, encoding="utf-8")
        driver = webdriver.Chrome(service=Service("/usr/bin/chromedriver"), options=options)
        try:
            driver.get(file.as_uri())
            height = driver.execute_script("return document.documentElement.getBoundingClientRect().height")
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                   {"width": WIDTH, "height": int(height), "deviceScaleFactor": 1, "mobile": False})  # fmt: skip
            driver.save_screenshot(str(OUT))
        finally:
            driver.quit()
    Image.open(OUT).convert("RGB").save(OUT, optimize=True)
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
