"""Text in many scripts, code and emoji for the tokenizer goldens and the tokenizer oracle.

Sentences are real; `corpus` recombines their words with digits, punctuation and white space from a
seed, and adds characters drawn from each script's block, so that any amount of text can be made
without shipping it.
"""

import random
import sys
from pathlib import Path

# Script -> a few sentences, and the block that random words are drawn from.
SCRIPTS = {
    "latin": ("All human beings are born free and equal in dignity and rights. Tous les êtres humains"
              " naissent libres. Şu çocuğun adı İbrahim'dir; größer, naïve, œuvre, ﬁne, ǅ.", 0x41, 0x24F),
    "greek": ("Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια. Σίσυφος ς.", 0x370, 0x3FF),
    "cyrillic": ("Все люди рождаются свободными и равными в своем достоинстве и правах. Їжак ґудзик.", 0x400, 0x4FF),
    "armenian": ("Բոլոր մարդիկ ծնվում են ազատ ու հավասար իրենց արժանապատվությամբ ու իրավունքներով։", 0x531, 0x58A),
    "hebrew": ("כל בני אדם נולדו בני חורין ושווים בערכם ובזכויותיהם. שָׁלוֹם עֲלֵיכֶם", 0x591, 0x5F4),
    "arabic": ("يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق. ٠١٢٣٤٥٦٧٨٩ السَّلَامُ", 0x600, 0x6FF),
    "devanagari": ("सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है। १२३", 0x900, 0x97F),
    "bengali": ("সমস্ত মানুষ স্বাধীনভাবে সমান মর্যাদা এবং অধিকার নিয়ে জন্মগ্রহণ করে। ৪৫৬", 0x980, 0x9FE),
    "gurmukhi": ("ਸਾਰਾ ਮਨੁੱਖੀ ਪਰਿਵਾਰ ਆਪਣੀ ਮਹਿਮਾ, ਸ਼ਾਨ ਅਤੇ ਹੱਕਾਂ ਦੇ ਪੱਖੋਂ ਜਨਮ ਤੋਂ ਹੀ ਆਜ਼ਾਦ ਹੈ।", 0xA01, 0xA76),
    "gujarati": ("પ્રતિષ્ઠા અને અધિકારોની દૃષ્ટિએ સર્વ માનવો જન્મથી સ્વતંત્ર અને સમાન હોય છે.", 0xA81, 0xAFF),
    "tamil": ("மனிதப் பிறிவியினர் சகலரும் சுதந்திரமாகவே பிறக்கின்றனர்; மதிப்பிலும் உரிமைகளிலும் சமம்.", 0xB82, 0xBFA),
    "telugu": ("ప్రతిపత్తిస్వత్వముల విషయమున మానవులెల్లరును జన్మతః స్వతంత్రులును సమానులును నగుదురు.", 0xC00, 0xC7F),
    "kannada": ("ಎಲ್ಲಾ ಮಾನವರೂ ಸ್ವತಂತ್ರರಾಗಿಯೇ ಹುಟ್ಟಿದ್ದಾರೆ ಹಾಗೂ ಘನತೆ ಸಮಾನರಾಗಿದ್ದಾರೆ.", 0xC80, 0xCF2),
    "malayalam": ("മനുഷ്യരെല്ലാവരും തുല്യാവകാശങ്ങളോടും അന്തസ്സോടും സ്വാതന്ത്ര്യത്തോടുംകൂടി ജനിച്ചിട്ടുള്ളവരാണ്.", 0xD00, 0xD7F),
    "sinhala": ("සියලු මනුෂ්‍යයෝ නිදහස්ව උපත ලබා ඇත. ගරුත්වයෙන් හා අයිතිවාසිකම්වලින් සමාන වෙති.", 0xD82, 0xDF4),
    "thai": ("มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ ๑๒๓", 0xE01, 0xE5B),
    "lao": ("ມະນຸດທຸກຄົນເກີດມາມີກຽດສັກສີ, ສິດທິ, ເສຣີພາບແລະຄວາມສເມີພາບເທົ່າທຽມກັນ.", 0xE81, 0xEDF),
    "tibetan": ("འགྲོ་བ་མིའི་རིགས་རྒྱུད་ཡོངས་ལ་སྐྱེས་ཙམ་ཉིད་ནས་ཆེ་མཐོངས་དང་ཐོབ་ཐངགི་རང་དབང་།", 0xF00, 0xFBC),
    "myanmar": ("လူတိုင်းသည် တူညီ လွတ်လပ်သော ဂုဏ်သိက္ခာဖြင့် လည်းကောင်း၊ မွေးဖွားလာသူများ ဖြစ်သည်။", 0x1000, 0x109F),
    "georgian": ("ყველა ადამიანი იბადება თავისუფალი და თანასწორი თავისი ღირსებითა და უფლებებით.", 0x10A0, 0x10FF),
    "ethiopic": ("የሰው ልጅ ሁሉ ሲወለድ ነጻና በክብርና በመብትም እኩልነት ያለው ነው። ፩፪፫", 0x1200, 0x137C),
    "khmer": ("មនុស្សទាំងអស់ កើតមកមានសេរីភាព និងសមភាព ក្នុងផ្នែកសេចក្ដីថ្លៃថ្នូរនិងសិទ្ធិ។", 0x1780, 0x17F9),
    "mongolian": ("Хүн бүр төрж мэндлэхэд эрх чөлөөтэй, адилхан. ᠬᠦᠮᠦᠨ ᠪᠦᠷ ᠲᠥᠷᠥᠵᠦ", 0x1810, 0x18AA),
    "kana": ("すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。ｶﾅ ガ", 0x3041, 0x30FF),
    "hangul": ("모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다. 각 힣", 0xAC00, 0xB2FF),
    "han": ("人人生而自由,在尊严和权利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神相對待。〇㊀", 0x4E00, 0x5FFF),
}

EMOJI = ["😀", "😂", "❤️", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "🇯🇵", "1️⃣", "🧑🏿‍🚀", "🔥", "✨", "☃", "⚙️", "🫠", "𝔘", "𝟙"]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\u00a0", "\u3000", "\u2003", "        ",
          "\x0b", "\x0c", "\x85", "\u2028", "\u180e", "\u200b", "\ufeff"]
PUNCTUATION = list(".,;:!?-_'\"()[]{}<>@#$%^&*+=/\\|~`") + ["...", "—", "«", "»", "¿", "、", "。", "'s", "'ll",
                                                         "'T", "'Re", "’s", "=>", "!=", "'ſ", "½", "²", "Ⅷ", "①"]
CODE = '''def f(x: int = 0x1F, *args, **kw) -> "list[str]":
    """Doc\\tstring."""
    return [f"{i:>08.3f}" for i in range(1_000) if i % 7 != 3]  # don't


template <class T, int N = 42>
constexpr auto operator<=>(const Foo<T>& a, const Foo<T>& b) noexcept { return a->x[i++] += b.y; }
SELECT count(*) FROM "t" WHERE a >= 3.14e-10 AND b LIKE '%x_%';
\t\tif (!strcmp(s, "\\xff\\n")) goto err;\r\n<div class="a b">&nbsp;</div>
{"key": [1, 2.5, null, true], "ключ": "значение"}
'''


def code_corpus(size):
    """Python's own standard library: real code, present wherever this runs."""
    folder = Path(sys.modules["random"].__file__).parent
    out, total = [CODE], len(CODE)
    for name in ("argparse", "ast", "random", "textwrap", "typing", "difflib"):
        text = (folder / f"{name}.py").read_text(encoding="utf-8")
        out.append(text)
        total += len(text)
        if total >= size:
            break
    return "\n".join(out)[:size]


def words(script, rng, count):
    """`count` characters or a little more of one script, as natural and as odd as the seed makes it."""
    sentence, low, high = SCRIPTS[script]
    known = sentence.split()
    block = [chr(c) for c in range(low, high + 1)]
    out, total = [], 0
    while total < count:
        kind = rng.random()
        if kind < 0.60:
            piece = rng.choice(known)
        elif kind < 0.80:
            piece = "".join(rng.choice(block) for _ in range(rng.randint(1, 9)))
        elif kind < 0.87:
            piece = str(rng.randint(0, 10 ** rng.randint(1, 12)))
        elif kind < 0.97:
            piece = rng.choice(PUNCTUATION)
        else:
            piece = rng.choice(EMOJI)
        piece += " " if rng.random() < 0.7 else (rng.choice(SPACES) if rng.random() < 0.5 else "")
        out.append(piece)
        total += len(piece)
    return "".join(out)


def corpus(seed, per_script, pieces=20):
    """(name, text) pairs: every script in several texts, code, emoji, white space and a mixture."""
    rng = random.Random(seed)
    texts = []
    for script in SCRIPTS:
        texts.append((script, SCRIPTS[script][0]))
        for _ in range(pieces):
            texts.append((script, words(script, rng, per_script // pieces)))
    code = code_corpus(per_script * 4)
    step = max(1, len(code) // pieces)
    texts += [("code", code[i:i + step]) for i in range(0, len(code), step)]
    for _ in range(pieces):
        texts.append(("emoji", "".join(rng.choice(EMOJI) + (rng.choice(SPACES) if rng.random() < 0.3 else "")
                                       for _ in range(per_script // pieces // 2))))
        texts.append(("spaces", "".join(rng.choice(SPACES) * rng.randint(1, 12) + rng.choice(["a", "1", ".", "é", "",])
                                        for _ in range(per_script // pieces // 4))))
        texts.append(("mixture", "".join(words(rng.choice(list(SCRIPTS)), rng, rng.randint(1, 30))
                                         for _ in range(20))))
        texts.append(("unicode", "".join(chr(rng.choice([rng.randint(1, 0x2FFF), rng.randint(0x3000, 0xD7FF),
                                                         rng.randint(0xE000, 0xFFFD), rng.randint(0x10000, 0x10FFFF)]))
                                         for _ in range(per_script // pieces))))
    return texts
