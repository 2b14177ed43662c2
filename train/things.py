"""The kinds of things and the settings that scenes are made of, with their names in two languages.

No name contains another kind's name or lies in a setting's phrase ("西兰花" would be read as "花"),
so that whoever reads an answer may search it for names.
"""

from dataclasses import dataclass

NUMBERS = {
    "en": ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "zh": ("没有", "一", "两", "三", "四", "五", "六", "七", "八", "九"),
}
COLOURS = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "black": "黑色",
    "white": "白色",
}


@dataclass(frozen=True)
class Thing:
    """A kind of thing.

    `bare` is the word without a piece or a vessel ("bread" of "loaf of bread"), `measure` the
    Chinese measure word, `colour` a key of COLOURS where every drawing of it has that colour.
    A `tintable` thing comes in several colours; on a `support` other things can stand.
    """

    emoji: str
    one: str
    many: str
    category: str
    chinese: str
    measure: str
    bare: str = ""
    colour: str = ""
    tintable: bool = False
    support: float = 0.0

    @property
    def some(self) -> str:
        """The English name without a number: "eggs", but "bread"."""
        return self.bare or self.many

    @property
    def article(self) -> str:
        """Before `one`."""
        return "an" if self.one[0] in "aeiou" else "a"

    def counted(self, count: int, language: str) -> str:
        """As in "one egg", "two eggs", "no eggs"; "一个鸡蛋", "两个鸡蛋", "没有鸡蛋"."""
        number = NUMBERS[language][count]
        if language == "en":
            return f"{number} {self.one if count == 1 else self.many}"
        return f"{number}{self.measure if count else ''}{self.chinese}"

    def names(self, language: str) -> tuple[str, ...]:
        """All names: singular, plural, bare."""
        if language == "zh":
            return (self.chinese,)
        return tuple(dict.fromkeys((self.one, self.many, self.some)))


THINGS = (
    # the first 34 in their old order: the example pictures and older data name them by number
    Thing("🐎", "horse", "horses", "animal", "马", "匹"),
    Thing("🐄", "cow", "cows", "animal", "奶牛", "头"),
    Thing("🐑", "sheep", "sheep", "animal", "绵羊", "只"),
    Thing("🐖", "pig", "pigs", "animal", "猪", "头"),
    Thing("🐕", "dog", "dogs", "animal", "狗", "只"),
    Thing("🐈", "cat", "cats", "animal", "猫", "只"),
    Thing("🦆", "duck", "ducks", "animal", "鸭子", "只"),
    Thing("🐓", "rooster", "roosters", "animal", "公鸡", "只"),
    Thing("🐇", "rabbit", "rabbits", "animal", "兔子", "只"),
    Thing("🐘", "elephant", "elephants", "animal", "大象", "头"),
    Thing("🦋", "butterfly", "butterflies", "animal", "蝴蝶", "只", tintable=True),
    Thing("🥚", "egg", "eggs", "food", "鸡蛋", "个"),
    Thing("🍞", "loaf of bread", "loaves of bread", "food", "面包", "个", bare="bread"),
    Thing("🥛", "glass of milk", "glasses of milk", "food", "牛奶", "杯", bare="milk"),
    Thing("🧀", "piece of cheese", "pieces of cheese", "food", "奶酪", "块", bare="cheese"),
    Thing("🍎", "apple", "apples", "food", "苹果", "个", colour="red"),
    Thing("🍌", "banana", "bananas", "food", "香蕉", "根", colour="yellow"),
    Thing("🥕", "carrot", "carrots", "food", "胡萝卜", "根", colour="orange"),
    Thing("🍅", "tomato", "tomatoes", "food", "西红柿", "个", colour="red"),
    Thing("🍋", "lemon", "lemons", "food", "柠檬", "个", colour="yellow"),
    Thing("🍓", "strawberry", "strawberries", "food", "草莓", "颗", colour="red"),
    Thing("🍍", "pineapple", "pineapples", "food", "菠萝", "个"),
    Thing("🍕", "slice of pizza", "slices of pizza", "food", "披萨", "块", bare="pizza"),
    Thing("🚗", "car", "cars", "vehicle", "汽车", "辆", tintable=True),
    Thing("🚌", "bus", "buses", "vehicle", "公交车", "辆", tintable=True),
    Thing("🚲", "bicycle", "bicycles", "vehicle", "自行车", "辆"),
    Thing("⛵", "boat", "boats", "vehicle", "帆船", "艘", tintable=True),
    Thing("🚜", "tractor", "tractors", "vehicle", "拖拉机", "台"),
    Thing("🪑", "chair", "chairs", "furniture", "椅子", "把", tintable=True, support=0.2),
    Thing("☕", "cup", "cups", "household", "杯子", "个", tintable=True),
    Thing("🔑", "key", "keys", "household", "钥匙", "把"),
    Thing("☂", "umbrella", "umbrellas", "household", "雨伞", "把", tintable=True),
    Thing("⏰", "clock", "clocks", "household", "闹钟", "个"),
    Thing("⚽", "ball", "balls", "household", "足球", "个", tintable=True),
    Thing("🐠", "fish", "fish", "animal", "鱼", "条"),
    Thing("🐢", "turtle", "turtles", "animal", "乌龟", "只"),
    Thing("🐸", "frog", "frogs", "animal", "青蛙", "只", colour="green"),
    Thing("🐝", "bee", "bees", "animal", "蜜蜂", "只"),
    Thing("🐌", "snail", "snails", "animal", "蜗牛", "只"),
    Thing("🦀", "crab", "crabs", "animal", "螃蟹", "只"),
    Thing("🐬", "dolphin", "dolphins", "animal", "海豚", "只"),
    Thing("🐧", "penguin", "penguins", "animal", "企鹅", "只"),
    Thing("🐒", "monkey", "monkeys", "animal", "猴子", "只"),
    Thing("🦁", "lion", "lions", "animal", "狮子", "头"),
    Thing("🦒", "giraffe", "giraffes", "animal", "长颈鹿", "只"),
    Thing("🐪", "camel", "camels", "animal", "骆驼", "头"),
    Thing("🐍", "snake", "snakes", "animal", "蛇", "条", colour="green"),
    Thing("🦢", "swan", "swans", "animal", "天鹅", "只", colour="white"),
    Thing("🍐", "pear", "pears", "food", "梨", "个", colour="green"),
    Thing(
        "🍇",
        "bunch of grapes",
        "bunches of grapes",
        "food",
        "葡萄",
        "串",
        bare="grapes",
        colour="purple",
    ),
    Thing(
        "🍉", "slice of watermelon", "slices of watermelon", "food", "西瓜", "块", bare="watermelon"
    ),
    Thing("🍆", "eggplant", "eggplants", "food", "茄子", "个", colour="purple"),
    Thing(
        "🥦",
        "head of broccoli",
        "heads of broccoli",
        "food",
        "西兰花",
        "棵",
        bare="broccoli",
        colour="green",
    ),
    Thing("🌽", "ear of corn", "ears of corn", "food", "玉米", "根", bare="corn"),
    Thing("🍄", "mushroom", "mushrooms", "food", "蘑菇", "朵"),
    Thing("🥒", "cucumber", "cucumbers", "food", "黄瓜", "根", colour="green"),
    Thing("🥐", "croissant", "croissants", "food", "牛角包", "个"),
    Thing("🍩", "donut", "donuts", "food", "甜甜圈", "个"),
    Thing("🎂", "cake", "cakes", "food", "蛋糕", "个"),
    Thing("🍔", "hamburger", "hamburgers", "food", "汉堡", "个"),
    Thing("🍦", "ice cream cone", "ice cream cones", "food", "冰淇淋", "个", bare="ice cream"),
    Thing("🍚", "bowl of rice", "bowls of rice", "food", "米饭", "碗", bare="rice"),
    Thing("🍯", "jar of honey", "jars of honey", "food", "蜂蜜", "罐", bare="honey"),
    Thing("✈", "airplane", "airplanes", "vehicle", "飞机", "架"),
    Thing("🚂", "train", "trains", "vehicle", "火车", "列"),
    Thing("🚚", "truck", "trucks", "vehicle", "卡车", "辆", tintable=True),
    Thing("🚁", "helicopter", "helicopters", "vehicle", "直升机", "架"),
    Thing("🏍", "motorcycle", "motorcycles", "vehicle", "摩托车", "辆"),
    Thing("🚀", "rocket", "rockets", "vehicle", "火箭", "枚"),
    Thing("📕", "book", "books", "household", "书", "本", tintable=True),
    Thing("✂", "pair of scissors", "pairs of scissors", "household", "剪刀", "把", bare="scissors"),
    Thing("💡", "light bulb", "light bulbs", "household", "灯泡", "个"),
    Thing("📱", "phone", "phones", "household", "手机", "部"),
    Thing("💻", "laptop", "laptops", "household", "电脑", "台"),
    Thing("📷", "camera", "cameras", "household", "照相机", "台"),
    Thing("🛏", "bed", "beds", "furniture", "床", "张", support=0.2),
    Thing("🛋", "sofa", "sofas", "furniture", "沙发", "个", support=0.2),
    Thing("📦", "box", "boxes", "furniture", "纸箱", "个", support=0.36),
    Thing("🧸", "teddy bear", "teddy bears", "household", "玩具熊", "个"),
    Thing("👟", "shoe", "shoes", "clothing", "鞋子", "只", tintable=True),
    Thing("👕", "shirt", "shirts", "clothing", "衬衫", "件", tintable=True),
    Thing("🎩", "hat", "hats", "clothing", "帽子", "顶", tintable=True),
    Thing("🎒", "backpack", "backpacks", "clothing", "背包", "个", tintable=True),
    Thing("🥄", "spoon", "spoons", "household", "勺子", "把"),
    Thing("🎸", "guitar", "guitars", "household", "吉他", "把", tintable=True),
    Thing("🎈", "balloon", "balloons", "household", "气球", "个", tintable=True),
    Thing("🌷", "tulip", "tulips", "plant", "郁金香", "朵", tintable=True),
    Thing("🌻", "sunflower", "sunflowers", "plant", "向日葵", "朵", colour="yellow"),
    Thing("🌳", "tree", "trees", "plant", "树", "棵", colour="green"),
    Thing("🌵", "cactus", "cacti", "plant", "仙人掌", "棵", colour="green"),
)
KINDS = {thing.one: kind for kind, thing in enumerate(THINGS)}


@dataclass(frozen=True)
class Setting:
    """A background: its phrases, and the things at home there: couples, the commonest first."""

    en: str
    zh: str
    home: tuple[str, ...]


def _setting(en: str, zh: str, home: str) -> Setting:
    return Setting(en, zh, tuple(home.split(", ")))


SETTINGS = {
    "water": _setting(
        "near the water",
        "在水边",
        "duck, boat, fish, turtle, swan, horse, dolphin, frog",
    ),
    "grass": _setting(
        "on the grass",
        "在草地上",
        "horse, sheep, cow, pig, dog, rooster, tractor, rabbit, ball, bicycle, butterfly, "
        "tree, tulip, bee, sunflower, snail",
    ),
    "beach": _setting(
        "on the beach",
        "在沙滩上",
        "umbrella, ball, boat, crab, chair, shoe, ice cream cone, hat, turtle, pineapple, "
        "dog, book",
    ),
    "sky": _setting(
        "in the sky",
        "在天空中",
        "airplane, balloon, helicopter, rocket, duck, butterfly, bee, swan",
    ),
    "table": _setting(
        "on a table",
        "在桌子上",
        "cup, cake, loaf of bread, piece of cheese, egg, spoon, apple, jar of honey, glass "
        "of milk, bowl of rice, slice of pizza, hamburger, croissant, donut, book, phone, "
        "laptop, lemon, bunch of grapes, pair of scissors",
    ),
    "cart": _setting(
        "in a shopping cart",
        "在购物车里",
        "glass of milk, egg, loaf of bread, banana, carrot, apple, tomato, piece of cheese, "
        "cucumber, head of broccoli, ear of corn, slice of watermelon, pineapple, box, jar "
        "of honey, light bulb",
    ),
    "snow": _setting(
        "in the snow",
        "在雪地里",
        "penguin, rabbit, dog, hat, tree, shoe, car, cat",
    ),
    "road": _setting(
        "on a road",
        "在公路上",
        "car, bus, truck, motorcycle, bicycle, cat, tractor, train, dog, backpack",
    ),
    "room": _setting(
        "in a room",
        "在房间里",
        "chair, cat, sofa, dog, bed, book, teddy bear, clock, box, key, guitar, shirt, "
        "laptop, light bulb, camera, balloon, shoe, backpack, umbrella, hat",
    ),
    "fridge": _setting(
        "in a fridge",
        "在冰箱里",
        "egg, glass of milk, piece of cheese, tomato, carrot, strawberry, cake, mushroom, "
        "cucumber, lemon, pear, eggplant, head of broccoli, slice of pizza, slice of "
        "watermelon, bunch of grapes",
    ),
    "forest": _setting(
        "in the forest",
        "在森林里",
        "tree, mushroom, snake, monkey, butterfly, elephant, rabbit, snail, frog, bee",
    ),
    "desert": _setting(
        "in the desert",
        "在沙漠里",
        "camel, cactus, lion, snake, elephant, giraffe, car, turtle",
    ),
}
