"""Phrasebook of the scenes: forms of prompts, questions and edits, and words for the same thing.

Forms hold slots: {c} the phrase of a prompt; {t} an object that is meant, {n} what is counted or
looked for, {ns} its plural; {a} {rel} {b} a relation; {name} {new} {place} of an edit; {claim} what
a yes-or-no question asserts; {x} a request, {q} a question inside a politer one.

"plain" forms are the templates of the default mix, "wide" ones belong to samples in wider wordings,
"held_out" ones are in no training sample: SceneBench asks with them. `HELD_OUT_WORDS` are synonyms
that training uses in other tasks, but never in this one.
"""

from __future__ import annotations

from typing import Literal

from neounify.scenes.world.lexicon import Language

Forms = tuple[str, ...]
FormSet = Literal["plain", "wide", "held_out"]
WordTask = Literal["paint", "question", "edit"]

_DRAWING = (
    *("draw {c}", "draw me {c}", "paint {c}", "paint me {c}", "show {c}", "show me {c}"),
    *("make {c}", "create {c}", "generate {c}", "give me {c}", "draw a picture of {c}"),
    *("paint a picture with {c}", "make an image of {c}", "create an image with {c}"),
    *("generate an image of {c}", "show me a picture of {c}", "make a drawing of {c}"),
    *("sketch {c}", "render {c}", "give me an image with {c}"),
)
_WISHES = (
    *("I'd like {c}", "I would like {c}", "I want {c}", "I want to see {c}", "I need {c}"),
    *("I'd like a picture of {c}", "I need an image with {c}", "picture: {c}", "image: {c}"),
    *("{c} please", "{c}, please", "let me see {c}", "can I have {c}?", "could I get {c}?"),
    *("there should be {c}", "a picture with {c}", "an image of {c}", "a drawing with {c}"),
    *("the picture shows {c}", "the image should show {c}", "{c}", "{c}", "{c}", "{c}"),
)
PROMPT_REQUESTS: dict[FormSet, dict[Language, Forms]] = {
    "wide": {
        "en": _DRAWING,
        "zh": ("画{c}", "画一张图，有{c}", "画出{c}", "生成{c}", "画一张有{c}的图片", "给我画{c}"),
    },
    "held_out": {
        "en": ("give me a picture of {c}", "create a drawing with {c}", "show me an image of {c}"),
        "zh": ("给我生成{c}", "给我画出{c}"),
    },
}
"""Requests, which a politer form may hold."""
PROMPT_STATEMENTS: dict[FormSet, dict[Language, Forms]] = {
    "wide": {
        "en": _WISHES,
        "zh": ("{c}", "{c}", "我想要{c}", "我想看{c}", "我要{c}", "图片：{c}", "来{c}"),
    },
    "held_out": {
        "en": ("I'd like to see {c}", "could I have {c}?", "the picture should show {c}"),
        "zh": ("我想看到{c}", "我要看{c}"),
    },
}

POLITE: dict[FormSet, dict[Language, Forms]] = {
    "wide": {
        "en": (
            *("{x}.", "{x}.", "{x}", "please {x}.", "please {x}.", "please {x}", "{x}, please."),
            *("{x} please", "could you {x}?", "can you {x}?", "could you please {x}?"),
            *("can you please {x}?", "would you {x}?", "I want you to {x}.", "now {x}."),
            *("can you {x} for me?", "will you {x}?", "hi, please {x}.", "let's {x}."),
        ),
        "zh": ("{x}", "{x}", "{x}。", "请{x}", "请{x}。", "帮我{x}", "你能{x}吗？", "现在{x}。"),
    },
    "held_out": {
        "en": ("would you please {x}?", "I'd like you to {x}.", "could you {x} for me?"),
        "zh": ("请帮我{x}", "可以{x}吗？"),
    },
}
"""Around a request {x}, which starts with a small letter and has no stop."""

ASKED: dict[FormSet, dict[Language, Forms]] = {
    "wide": {
        "en": (
            *("{q}", "{q}", "{q}", "{q}", "please tell me: {q}", "tell me, {q}"),
            *("can you tell me: {q}", "look at the picture. {q}", "question: {q}", "please: {q}"),
            *("{q} Please answer.", "and now: {q}"),
        ),
        "zh": ("{q}", "{q}", "{q}", "请问{q}", "请告诉我，{q}", "看图，{q}"),
    },
    "held_out": {
        "en": ("please answer: {q}", "can you say: {q}", "look at the image and tell me: {q}"),
        "zh": ("请回答，{q}", "看图告诉我，{q}"),
    },
}

EDIT_FORMS: dict[FormSet, dict[Language, dict[str, Forms]]] = {
    "plain": {
        "en": {
            "recolour": (
                "Make {name} {new}.",
                "Change the colour of {name} to {new}.",
                "Recolour {name} {new}.",
                "Paint {name} {new}.",
                "Turn {name} {new}.",
            ),
            "remove": ("Remove {name}.", "Take {name} away.", "Delete {name}.", "Erase {name}."),
            "add": (
                "Add {name} in the {place}.",
                "Put {name} in the {place}.",
                "Draw {name} in the {place}.",
                "In the {place}, add {name}.",
            ),
            "move": ("Move {name} to the {place}.", "Shift {name} to the {place}."),
            "background": (
                "Make the background {new}.",
                "Change the background to {new}.",
                "Turn the background {new}.",
                "Give it a {new} background.",
            ),
        },
        "zh": {
            "recolour": ("把{name}变成{new}", "将{name}改为{new}"),
            "remove": ("去掉{name}", "把{name}删除"),
            "add": ("在{place}加上{name}", "在{place}添加{name}"),
            "move": ("把{name}移到{place}", "将{name}移动到{place}"),
            "background": ("把背景换成{new}", "将背景改为{new}"),
        },
    },
    "wide": {
        "en": {
            "recolour": (
                *("make {name} {new}", "turn {name} {new}", "paint {name} {new}"),
                *("colour {name} {new}", "change {name} to {new}", "color {name} in {new}"),
                *("change the color of {name} to {new}", "let {name} be {new}"),
                *("turn {name} into {new}", "set the colour of {name} to {new}"),
            ),
            "remove": (
                *("remove {name}", "remove {name}", "delete {name}", "erase {name}"),
                *("take {name} away", "take away {name}", "get rid of {name}", "take {name} out"),
                *("make {name} disappear", "drop {name}", "wipe {name} away"),
            ),
            "add": (
                *("add {name} in the {place}", "add {name} to the {place}"),
                *("put {name} in the {place}", "place {name} in the {place}"),
                *("draw {name} at the {place}", "insert {name} in the {place}"),
                *("in the {place}, draw {name}", "put {name} into the {place}"),
            ),
            "move": (
                *("move {name} to the {place}", "shift {name} to the {place}"),
                *("put {name} in the {place}", "put {name} in the {place}"),
                *("place {name} in the {place}", "bring {name} to the {place}"),
                *("push {name} to the {place}", "move {name} into the {place}"),
            ),
            "background": (
                *("make the background {new}", "set the background to {new}"),
                *("use a {new} background", "put it on a {new} background"),
                *("put everything on a {new} background", "paint the background {new}"),
                *("colour the background {new}", "change the background colour to {new}"),
                *("put the picture on a {new} background", "replace the background with {new}"),
            ),
        },
        "zh": {
            "recolour": ("把{name}改成{new}", "把{name}涂成{new}", "让{name}变成{new}"),
            "remove": ("删除{name}", "移除{name}", "把{name}去掉", "拿走{name}", "不要{name}"),
            "add": (
                "在{place}画{name}",
                "{place}加{name}",
                "在{place}放{name}",
                "在{place}加{name}",
            ),
            "move": ("把{name}放到{place}", "移动{name}到{place}", "将{name}移到{place}"),
            "background": ("把背景改成{new}", "把背景变成{new}", "用{new}背景", "把背景涂成{new}"),
        },
    },
    "held_out": {
        "en": {
            "recolour": ("give {name} the colour {new}", "have {name} be {new}"),
            "remove": ("remove {name} from the picture", "make {name} go away"),
            "add": ("place {name} at the {place}", "in the {place}, put {name}"),
            "move": ("bring {name} into the {place}", "shift {name} into the {place}"),
            "background": ("put all of it on a {new} background", "turn the background into {new}"),
        },
        "zh": {
            "recolour": ("将{name}变成{new}", "让{name}变{new}"),
            "remove": ("把{name}移除", "把{name}拿走"),
            "add": ("在{place}画上{name}", "往{place}加{name}"),
            "move": ("把{name}移动到{place}", "将{name}放到{place}"),
            "background": ("将背景换成{new}", "让背景变成{new}"),
        },
    },
}
EDIT_STATEMENTS: dict[Language, dict[str, Forms]] = {
    "en": {
        "recolour": (
            "{name} should be {new}.",
            "I want {name} to be {new}.",
            "I want {name} {new}.",
        ),
        "remove": ("I don't want {name}.", "{name} should go.", "no more {name}."),
        "add": ("there should be {name} in the {place}.", "I want {name} in the {place}."),
        "move": ("{name} should be in the {place}.", "I want {name} to be in the {place}."),
        "background": ("the background should be {new}.", "I want a {new} background."),
    },
    "zh": {
        "recolour": ("{name}要{new}",),
        "remove": ("我不要{name}",),
        "add": ("{place}要有{name}",),
        "move": ("{name}要在{place}",),
        "background": ("背景要{new}",),
    },
}
"""Wishes that no polite form holds; wide."""
KEEP_FORMS: dict[Language, Forms] = {
    "en": ("keep it as it is", "leave everything as it is", "do not change anything", "copy it"),
    "zh": ("保持不变", "照着画", "什么都不要改"),
}

QUESTION_FORMS: dict[FormSet, dict[Language, dict[str, Forms]]] = {
    "plain": {
        "en": {
            "shape": ("What shape is {t}?", "Which shape does {t} have?"),
            "colour": ("What colour is {t}?", "What color is {t}?", "Which colour is {t}?"),
            "size": ("Is {t} small or large?", "What size is {t}?"),
            "where": ("Where is {t}?", "In which place is {t}?"),
            "background": (
                "What colour is the background?",
                "What color is the background?",
                "Which background does the picture have?",
            ),
            "count": ("How many {ns} are there?", "How many {ns} do you see?"),
            "exists": ("Is there {n}?", "Do you see {n}?"),
            "across": ("Is {a} left or right of {b}?",),
            "along": ("Is {a} above or below {b}?",),
        },
        "zh": {
            "shape": ("{t}是什么形状？",),
            "colour": ("{t}是什么颜色？",),
            "size": ("{t}是大的还是小的？",),
            "where": ("{t}在哪里？",),
            "background": ("背景是什么颜色？",),
            "count": ("图中有几个{ns}？",),
            "exists": ("图中有{n}吗？",),
            "across": ("{a}在{b}的左边还是右边？",),
            "along": ("{a}在{b}的上面还是下面？",),
        },
    },
    "wide": {
        "en": {
            "shape": (
                *("What is the shape of {t}?", "Tell me the shape of {t}.", "What is {t}?"),
                *("What kind of shape is {t}?", "Name the shape of {t}."),
            ),
            "colour": (
                *("What is the colour of {t}?", "Which color is {t}?", "Name the colour of {t}."),
                *("What is the color of {t}?", "{t} is what colour?", "{t} has which colour?"),
            ),
            "size": ("How large is {t}?", "How big is {t}?", "What is the size of {t}?"),
            "where": (
                *("Where do you see {t}?", "Where is {t} in the picture?", "Where's {t}?"),
                *("What is the position of {t}?", "Where can I find {t}?", "{t} is where?"),
            ),
            "background": (
                *("What is the colour of the background?", "Which colour is the background?"),
                *("What background is it?", "Name the colour of the background."),
            ),
            "count": (
                *("How many {ns} are in the picture?", "How many {ns} can you see?"),
                *("Count the {ns}.", "What is the number of {ns}?", "How many {ns}?"),
            ),
            "exists": (
                *("Is there {n} in the picture?", "Can you see {n}?", "Does the picture show {n}?"),
                *("Does the image contain {n}?", "Are there any {ns}?", "Is there any {n1}?"),
            ),
            "across": (
                *("Is {a} to the left or to the right of {b}?", "Is {a} right or left of {b}?"),
                "Does {a} lie left or right of {b}?",
            ),
            "along": ("Is {a} below or above {b}?", "Does {a} lie above or below {b}?"),
            "is relation": (
                *("Is {a} {rel} {b}?", "Is {a} {rel} {b}?", "Does {a} lie {rel} {b}?"),
                *("Is it true that {a} is {rel} {b}?", "{a} is {rel} {b}, right?"),
            ),
            "is colour": ("Is {t} {claim}?", "Is it true that {t} is {claim}?"),
            "is shape": ("Is {t} a {claim}?", "Is it true that {t} is a {claim}?"),
            "is size": ("Is {t} {claim}?", "Is it true that {t} is {claim}?"),
            "is where": ("Is {t} in the {claim}?", "Does {t} lie in the {claim}?"),
            "is background": ("Is the background {claim}?", "Is it on a {claim} background?"),
            "is count": ("Are there exactly {claim}?", "Do you see exactly {claim}?"),
        },
        "zh": {
            "shape": ("{t}的形状是什么？", "{t}是什么？", "{t}什么形状？"),
            "colour": ("{t}的颜色是什么？", "{t}什么颜色？", "{t}是啥颜色？"),
            "size": ("{t}有多大？", "{t}是大还是小？"),
            "where": ("{t}在哪儿？", "{t}的位置在哪里？", "{t}在图中哪里？"),
            "background": ("背景的颜色是什么？", "背景什么颜色？"),
            "count": ("有几个{ns}？", "图里有多少个{ns}？", "一共有几个{ns}？"),
            "exists": ("有{n}吗？", "图里有没有{ns}？", "你看到{n}了吗？"),
            "across": ("{a}是在{b}的左边还是右边？", "{a}在{b}的左侧还是右侧？"),
            "along": ("{a}是在{b}的上面还是下面？", "{a}在{b}的上方还是下方？"),
            "is relation": ("{a}在{b}的{rel}吗？", "{a}是不是在{b}的{rel}？"),
            "is colour": ("{t}是{claim}吗？", "{t}是不是{claim}？"),
            "is shape": ("{t}是{claim}吗？", "{t}是不是{claim}？"),
            "is size": ("{t}是{claim}的吗？", "{t}是不是{claim}的？"),
            "is where": ("{t}在{claim}吗？", "{t}是不是在{claim}？"),
            "is background": ("背景是{claim}吗？", "背景是不是{claim}？"),
            "is count": ("正好有{claim}吗？", "是不是正好有{claim}？"),
        },
    },
    "held_out": {
        "en": {
            "shape": ("Which shape is {t}?", "What shape does {t} have?"),
            "colour": ("Which colour does {t} have?", "Tell me the colour of {t}."),
            "size": ("Which size is {t}?", "Tell me the size of {t}."),
            "where": ("In which place do you see {t}?", "What is the place of {t}?"),
            "background": ("What colour does the background have?", "Name the background colour."),
            "count": ("How many {ns} does the picture show?", "Name the number of {ns}."),
            "exists": ("Is {n} in the picture?", "Does the picture have {n}?"),
            "across": ("Does {a} lie to the left or to the right of {b}?",),
            "along": ("Is {a} above {b} or below?",),
            "is relation": ("Do you see {a} {rel} {b}?", "Is it right that {a} is {rel} {b}?"),
            "is colour": ("Does {t} have the colour {claim}?", "{t} is {claim}, right?"),
            "is shape": ("Does {t} have the shape of a {claim}?",),
            "is size": ("{t} is {claim}, right?",),
            "is where": ("Do you see {t} in the {claim}?",),
            "is background": ("Is it true that the background is {claim}?",),
            "is count": ("Is it true that there are exactly {claim}?",),
        },
        "zh": {
            "shape": ("{t}的形状是哪个？",),
            "colour": ("{t}的颜色是哪个？",),
            "size": ("{t}是小的还是大的？",),
            "where": ("{t}在图里哪儿？",),
            "background": ("背景是啥颜色？",),
            "count": ("图里一共有几个{ns}？",),
            "exists": ("图里有{n}吗？", "图中有没有{ns}？"),
            "across": ("{a}在{b}的哪边，左边还是右边？",),
            "along": ("{a}在{b}的哪边，上面还是下面？",),
            "is relation": ("{a}是在{b}的{rel}吗？",),
            "is colour": ("{t}的颜色是{claim}吗？",),
            "is shape": ("{t}的形状是{claim}吗？",),
            "is size": ("{t}是不是很{claim}？",),
            "is where": ("{t}是在{claim}吗？",),
            "is background": ("背景的颜色是{claim}吗？",),
            "is count": ("图里正好有{claim}吗？",),
        },
    },
}
"""By kind; "across" and "along" are the two directions of "relation", "is …" ask for yes or no."""

CAPTION_FORMS: dict[Language, dict[str, Forms]] = {
    "en": {
        "brief": (
            *("What do you see?", "What is there?", "Tell me briefly what you see."),
            *("What does the picture show?", "Describe the image briefly."),
        ),
        "full": (
            *("Describe the image in detail.", "Tell me everything that you see."),
            *("What do you see in detail?", "Give me all details.", "Describe all of it."),
        ),
    },
    "zh": {
        "brief": ("你看到什么？", "图里有什么？", "简单说说这张图。"),
        "full": ("详细说说这张图。", "描述所有细节。"),
    },
}

NO_IMAGE: dict[Language, str] = {"en": "there is no image", "zh": "没有图片"}
"""The answer to a question about an image that was not given."""

IMAGE_WORDS = ("image", "picture", "图")
"""How an answer may call an image."""
PLAIN_WORDS = (
    "there are background against contains shows starts begins story pictures tell",
    "yes no image picture drawing paint what which same again nothing describe briefly",
)
"""Words of the plain templates that are written elsewhere."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "circle": ("disc", "disk", "round shape", "dot", "ball"),
    "square": ("box", "block", "square shape"),
    "triangle": ("triangular shape", "pyramid"),
    "cross": ("plus sign", "plus", "cross shape"),
    "star": ("star shape", "five-pointed star", "asterisk"),
    "object": ("shape", "thing", "figure", "item"),
    "red": ("crimson", "scarlet"),
    "green": ("emerald",),
    "blue": ("navy", "navy blue"),
    "yellow": ("golden",),
    "purple": ("violet",),
    "orange": ("tangerine", "amber"),
    "cyan": ("turquoise", "aqua"),
    "pink": ("rose", "rosy"),
    "grey": ("gray",),
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "left of": ("to the left of", "on the left of", "on the left side of"),
    "right of": ("to the right of", "on the right of", "on the right side of"),
    "above": ("over", "on top of", "higher than"),
    "below": ("under", "beneath", "underneath", "lower than"),
    "top left": ("upper left", "top left corner", "upper left corner"),
    "top right": ("upper right", "top right corner", "upper right corner"),
    "bottom left": ("lower left", "bottom left corner", "lower left corner"),
    "bottom right": ("lower right", "bottom right corner", "lower right corner"),
}
"""Words and phrases that mean the same in this world; nouns in the singular."""
CHINESE_SYNONYMS: dict[str, tuple[str, ...]] = {
    "圆形": ("圆", "圆的图形"),
    "正方形": ("方块", "方形"),
    "三角形": ("三角",),
    "十字形": ("十字", "加号"),
    "五角星": ("星星", "星形"),
    "物体": ("东西",),
    "左上角": ("左上方", "左上"),
    "右上角": ("右上方", "右上"),
    "左下角": ("左下方", "左下"),
    "右下角": ("右下方", "右下"),
    "橙色": ("橘色",),
    "粉色": ("粉红色",),
    "青色": ("青绿色",),
    "左边": ("左侧", "左面"),
    "右边": ("右侧", "右面"),
    "上面": ("上方", "上边"),
    "下面": ("下方", "下边"),
}
HELD_OUT_WORDS: dict[WordTask, frozenset[str]] = {
    "paint": frozenset({"disk", "block", "scarlet", "big", "beneath", "方形", "粉红色"}),
    "question": frozenset({"disc", "plus", "crimson", "tiny", "on the left side of", "星星"}),
    "edit": frozenset({"box", "star shape", "violet", "huge", "upper left corner", "加号", "橘色"}),
}
"""Synonyms of each task that no training sample of it uses."""
