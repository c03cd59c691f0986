// Faults of a page that a machine can find: layout, names, structure, targets, contrast. One line for each.
() => {
  const faults = [];
  const all = (selector) => [...document.querySelectorAll(selector)];
  const say = (what, element) => faults.push(`${what}: ${element.outerHTML.slice(0, 120)}`);
  const isShown = (element) =>
    element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;
  const nameOf = (element) => {
    const label = document.getElementById(element.getAttribute("aria-labelledby"));
    return (element.getAttribute("aria-label") || label?.textContent || element.textContent).trim();
  };
  const root = document.documentElement;

  // Layout and structure
  if (root.scrollWidth > root.clientWidth) faults.push(`sideways scroll: ${root.scrollWidth} > ${root.clientWidth}`);
  if (!root.lang) faults.push("no language");
  if (!document.title.trim()) faults.push("no title");
  for (const once of ["main", "h1"]) if (all(once).length !== 1) faults.push(`not one ${once}`);
  const ids = all("[id]").map((element) => element.id);
  ids.filter((id, at) => ids.indexOf(id) !== at).forEach((id) => faults.push(`id twice: ${id}`));
  const levels = all("h1, h2, h3, h4").map((heading) => Number(heading.tagName[1]));
  levels.forEach((level, at) => {
    if (at && level > levels[at - 1] + 1) faults.push(`heading level skipped: h${level}`);
  });

  // Names
  for (const element of all("[aria-labelledby]"))
    if (!document.getElementById(element.getAttribute("aria-labelledby"))) say("label is missing", element);
  const named = "a, button, summary, section, nav, [role=region], [role=slider], [role=img], pre[tabindex]";
  for (const element of all(named)) if (!nameOf(element)) say("no name", element);
  for (const element of all("a:not([href])")) say("link without address", element);
  for (const element of all("svg:not([aria-hidden]):not([role])")) say("picture without role", element);
  for (const table of all("table")) {
    if (!table.caption?.textContent.trim()) say("table without caption", table);
    for (const cell of table.querySelectorAll("th:not([scope])")) say("header without scope", cell);
  }

  // Targets. Source: WCAG 2.2, 2.5.8
  for (const element of all("a, button, summary")) {
    const { width, height } = element.getBoundingClientRect();
    const isSmall = width < 24 || height < 24;
    if (isSmall && isShown(element) && !element.matches(".skip")) say(`target ${width} x ${height}`, element);
  }

  // Contrast. Source: WCAG 2.2, 1.4.3
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const channelsOf = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (channels) => {
    const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    const [red, green, blue] = channels.map((channel) => linear(channel / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const groundOf = (start) => {
    for (let element = start; element; element = element.parentElement) {
      const channels = channelsOf(getComputedStyle(element).backgroundColor);
      if (channels[3] === 255) return channels;
    }
    return [255, 255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const isSkipped = element.closest(".visually-hidden, title, .skip");
    if (!walker.currentNode.textContent.trim() || isSkipped || !isShown(element)) continue;
    const picture = element.closest("svg");
    const style = getComputedStyle(element);
    const lights = [channelsOf(picture ? style.fill : style.color), groundOf(picture?.parentElement ?? element)];
    const [darker, lighter] = lights.map(luminance).sort((one, other) => one - other);
    const ratio = (lighter + 0.05) / (darker + 0.05);
    const size = parseFloat(style.fontSize);
    const isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 600);
    if (ratio < (isLarge ? 3 : 4.5)) say(`contrast ${ratio.toFixed(2)}`, element);
    const { left, right } = element.getBoundingClientRect();
    const mayBeCut = element.closest(".scroll, .clip, svg, pre");
    if (!mayBeCut && (right > root.clientWidth + 0.5 || left < -0.5)) say("text cut off", element);
  }
  return faults;
}
