#!/usr/bin/env python3
"""Every verb that users can call says what it costs, under the same headings (docs/README.md, "Reference comments").

usage: reference.py FILE...

A verb is a function in an exported namespace, or in the public part of a class there (of a header: in any namespace but
`detail`). Its comment holds the headings, in this order; or that of its class does, which then speaks for all members
that say nothing. Left out are

  - what the language calls: constructors, destructors, operators, and what a coroutine's promise or awaiter has;
  - the members of `..._operation` and the like, which are awaited and otherwise called by us alone;
  - questions: what is `constexpr`, or `[[nodiscard]]` and `noexcept`;
  - an overload right below the one that is described, and what begins with "The same".

This is no parser of C++, only of how we write it: what it cannot read, it names.
"""

import re
import sys

HEADINGS = ["Waits", "Cancel safety", "Allocates", "Errors", "Complexity"]
CALLED_BY_THE_LANGUAGE = re.compile(
    r"operator|~|await_(ready|suspend|resume|transform)$|get_return_object|(initial|final)_suspend$|unhandled_exception$"
    r"|return_(value|void)$")
PART_OF_AN_AWAITED_OBJECT = re.compile(r".*(_operation|_suspension|_promise)$|operation_base$|task_promise_base$")
NO_NAMES = {"requires", "noexcept", "decltype", "alignas", "sizeof", "explicit", "static_assert"}


def without_templates(head):
    """The head of a declaration without its attributes and its `template <...>`."""
    head = re.sub(r"\[\[.*?\]\]", " ", head)
    while True:
        start = re.search(r"\btemplate\s*<", head)
        if not start:
            return head.strip()
        depth, at = 1, start.end()
        while depth and at < len(head):
            depth += {"<": 1, ">": -1}.get(head[at], 0)
            at += 1
        head = head[: start.start()] + head[at:]


def name_of(head):
    for found in re.finditer(r"(operator\s*[^\s\w(]+|operator\s+\w+|~?[A-Za-z_]\w*)\s*\(", head):
        if found.group(1) not in NO_NAMES:
            return found.group(1)
    return ""


class Scope:
    def __init__(self, kind, name="", public=True, exported=False, comment=""):
        self.kind, self.name, self.public, self.exported, self.comment = kind, name, public, exported, comment


def declarations(path):
    """Yields (line, scopes, head, comment) for each function that the file declares."""
    is_header = path.endswith(".hpp")
    scopes = []
    statement, began, comment, above = "", 0, "", ""
    in_macro = False
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        text = line.strip()
        if text.startswith("///"):
            above += text[3:] + "\n"
            continue
        if in_macro or text.startswith("#"):
            in_macro = text.endswith("\\")
            continue
        if not text:
            above = ""
        text = re.sub(r'"(\\.|[^"\\])*"', '""', line)
        text = re.sub(r"'(\\.|[^'\\])'", "0", text)
        text = re.sub(r"//.*", "", text)
        for character in text:
            if not statement.strip() and not character.isspace() and character not in "{};":
                statement, began, comment, above = "", number, above, ""
            within = scopes[-1] if scopes else None
            if character == "{":
                head = without_templates(statement)
                kind = re.search(r"\b(class|struct|union)\s+(?:alignas\s*\([^)]*\)\s*)?([A-Za-z_]\w*)", head)
                if within and within.kind in ("body", "other"):
                    scopes.append(Scope("other"))
                elif re.search(r"\brequires\s*(\([^()]*\))?$", head):
                    scopes.append(Scope("condition"))  # of a declaration that goes on behind it
                    continue
                elif re.search(r"\bnamespace\b", head):
                    exported = is_header or "export" in head or any(s.exported for s in scopes)
                    scopes.append(Scope("namespace", head.split()[-1], exported=exported and "detail" not in head))
                elif kind and not head.endswith(")") and not re.search(r"\)\s*(const|noexcept|->)", head):
                    scopes.append(Scope("class", kind.group(2), public=kind.group(1) != "class", comment=comment))
                elif "(" in head and not head.endswith("="):
                    yield began, list(scopes), without_templates(statement), statement, comment
                    scopes.append(Scope("body"))
                else:
                    scopes.append(Scope("other"))
                statement = ""
            elif character == "}":
                if not scopes:
                    sys.exit(f"{path}:{number}: expected as many {{ as }}, found one }} more")
                if scopes.pop().kind != "condition":
                    statement = ""
            elif character == ";":
                if within and within.kind in ("namespace", "class") and "(" in statement:
                    yield began, list(scopes), without_templates(statement), statement, comment
                statement = ""
            else:
                statement += character
                label = re.search(r"\b(public|private|protected)\s*:$", statement)
                if label and within and within.kind == "class":
                    within.public, statement = label.group(1) == "public", ""
    if scopes:
        sys.exit(f"{path}: expected as many }} as {{, found {len(scopes)} {{ more")


def lacking(comment):
    """What a comment lacks of the headings; None: it has none of them."""
    text = " ".join(comment.split())
    found = [(text.index(h + ":"), h) for h in HEADINGS if re.search(rf"\b{h}:", text)]
    if not found:
        return None
    if [h for _, h in sorted(found)] != [h for h in HEADINGS if h in dict((h, 0) for _, h in found)]:
        return ["the usual order"]
    missing = [h for h in HEADINGS if h not in [h for _, h in found]]
    if re.search(r"\bWaits: never\b", text) and "Cancel safety" in missing:
        missing.remove("Cancel safety")  # nobody could cancel it
    return missing


def main(paths):
    verbs = failures = 0
    for path in paths:
        described = None
        for line, scopes, head, statement, comment in declarations(path):
            classes = [s for s in scopes if s.kind == "class"]
            if not any(s.exported for s in scopes) or any(s.kind == "namespace" and not s.exported for s in scopes):
                continue
            if len(classes) > 1 or any(not s.public for s in classes):
                continue
            owner = classes[0] if classes else Scope("")
            if PART_OF_AN_AWAITED_OBJECT.match(owner.name):
                continue
            name = name_of(head)
            if not name or name == owner.name or CALLED_BY_THE_LANGUAGE.match(name):
                continue
            if f"::{name}" in head:
                continue  # the definition of what a class declares
            if re.search(r"\bconstexpr\b|=\s*(delete|default)\b|\bfriend\b|^using\b|^(inline )?static_assert", head):
                continue
            if re.search(r"\bstd::(function|move_only_function)\s*<", head.split(name + "(")[0]) or "(*" in head:
                continue  # a variable
            if "[[nodiscard" in statement and re.search(r"\)\s*(const\s*)?&*\s*noexcept\s*(= 0)?(requires.*)?(:.*)?$", head, re.S):
                continue
            if not comment and described == (owner.name, name):
                continue
            described = (owner.name, name)
            if comment.lstrip().startswith("The same"):
                continue
            verbs += 1
            missing = lacking(comment)
            if missing is None:
                missing = lacking(owner.comment)
                if missing is None:
                    missing = HEADINGS
            if missing:
                failures += 1
                whole = f"{owner.name}::{name}" if owner.name else name
                print(f"FAILED: {path}:{line}: {whole}: its comment lacks {', '.join(missing)}")
    if verbs < 50:
        sys.exit(f"expected more than 50 verbs, found {verbs}: this program cannot read them any more")
    print(f"{verbs} verbs, {failures} of them not described")
    sys.exit(1 if failures else 0)


main(sys.argv[1:])
