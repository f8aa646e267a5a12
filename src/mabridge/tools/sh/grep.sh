# grep: ERE RUST BYTES LONGEST
# Searches the text files at or below PATH: ERE is the pattern for grep, as bytes written for printf %b, RUST the same one
# for ripgrep. Answers: ok, the canonical PATH, "file" or "tree"; then for each file with a match, in order, a line of NUL,
# its path from PATH, NUL, and the matching lines as PATH:NUMBER:TEXT, or NUMBER:TEXT where the path has a newline in it;
# BYTES in all. Lines of more than LONGEST bytes are left out or cut.
resolve "$@"
shift "$taken"
ere=$1 rust=$2 bytes=$3 longest=$4
[ -e "$target" ] || absent
[ -r "$target" ] || fail error 'permission denied'

if command -v rg >/dev/null; then
  flags='rg --no-config --color never --no-messages -a -E none --no-mmap --no-heading'
  pattern=$rust
elif command -v grep >/dev/null; then
  flags='grep -s -a -E' pattern=$(printf '%b' "$ere")
else
  fail no-tool
fi
: | $flags -e "$pattern" >/dev/null
[ "$?" -lt 2 ] || exit 1

# Also for the shells that find starts. A file with a NUL among its first 512 bytes is not text.
show='show() {
  case $(od -An -v -tx1 -N512 "$1" 2>/dev/null) in *" 00"*) return ;; esac
  printf "\000%s\000\n" "$1" || exit
  case $1 in
    *"$nl"*) $flags -n -e "$pattern" -- "$1" | short "$longest" ;;
    *) $flags -n -H -e "$pattern" -- "$1" | short "$((longest + ${#1}))" ;;
  esac
}'
if command -v awk >/dev/null; then
  show="$show
short() { awk \"length(\\\$0) <= \$1\"; }"
else
  show="$show
short() { cut -b \"1-\$1\"; }"
fi
eval "$show"
export flags pattern show longest nl

texts() {
  find . -type d \( -name .git -o -name node_modules \) -prune -o -type f "$@" 2>/dev/null
}

# walk DIR plain|odd: what names or search_odd does, for the images that have no find.
walk() {
  set +f
  set -- "$2" "$1"/* "$1"/.[!.]* "$1"/..?*
  set -f
  kind=$1
  shift
  for entry; do
    shift
    if [ -L "$entry" ]; then
      continue
    elif [ -f "$entry" ]; then
      case $kind-$entry in
        odd-*"$nl"*) if $flags -q -e "$pattern" -- "$entry"; then show "$entry"; fi ;;
        odd-* | *"$nl"*) ;;
        *) set -- "$@" "$entry" ;;
      esac
    elif [ -d "$entry" ]; then
      case ${entry##*/} in .git | node_modules) ;; *) (walk "$entry" "$kind") ;; esac
    fi
  done
  [ "$#" -eq 0 ] || $flags -l -e "$pattern" -- "$@"
}

# names: a line for each file with a match. One whose path has a newline in it is left to search_odd.
names() {
  if command -v find >/dev/null; then
    texts ! -path "*$nl*" -exec $flags -l -e "$pattern" -- {} +
  else
    walk . plain
  fi
}
search_odd() {
  if command -v find >/dev/null; then
    texts -path "*$nl*" -exec $flags -q -e "$pattern" -- {} \; \
      -exec /bin/sh -c 'eval "$show"; for file; do show "$file"; done' mab {} +
  else
    walk . odd
  fi
}

{
  if [ -d "$target" ]; then
    say ok "$target" tree
    cd "$target" || exit 1
    names | sort | while IFS= read -r file; do show "$file"; done
    search_odd
  elif [ -f "$target" ]; then
    say ok "$target" file
    show "$target"
  else
    fail irregular
  fi
} | head -c "$bytes"
