// Looks at pages in headless Chromium as their readers do: `node check_page.mjs PAGE...` from a folder that has
// puppeteer-core and axe-core. Every page is tried wide and narrow, light, dark and printed, folded and unfolded.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { resolve } from "node:path";
import { pathToFileURL } from "node:url";

const installed = createRequire(resolve("package.json"));
const puppeteer = installed("puppeteer-core");
const axe = readFileSync(installed.resolve("axe-core/axe.min.js"), "utf8");
const pages = process.argv.slice(2);
const modes = {
  light: { media: "screen", scheme: "light" },
  dark: { media: "screen", scheme: "dark" },
  print: { media: "print", scheme: "light" },
};
const faults = [];

async function look(tab, page, width, mode, { media, scheme }) {
  await tab.setViewport({ width, height: 900 });
  await tab.emulateMediaType(media);
  await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
  await tab.goto(pathToFileURL(resolve(page)).href);
  await tab.evaluate(axe);
  for (const open of [false, true]) {
    await tab.evaluate((value) => document.querySelectorAll("details").forEach((part) => { part.open = value; }), open);
    const found = await tab.evaluate(() => axe.run());
    const place = `${page}, ${width} pixels, ${mode}, ${open ? "unfolded" : "folded"}`;
    for (const { id, help, nodes } of found.violations) {
      faults.push(`${place}: ${id}: ${help}: ${nodes.slice(0, 3).map((node) => node.html.slice(0, 160)).join(" | ")}`);
    }
    const over = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    if (over > 0) faults.push(`${place}: ${over} pixels wider than the window`);
  }
}

if (!pages.length) throw new Error("no page: name at least one HTML file");
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"],
});
try {
  const tab = await browser.newPage();
  // 718 pixels are the width of A4 between usual margins.
  for (const page of pages) {
    for (const width of [1280, 718, 390]) {
      for (const [mode, how] of Object.entries(modes)) await look(tab, page, width, mode, how);
    }
  }
} finally {
  await browser.close();
}
faults.forEach((fault) => console.log(fault));
console.log(`${pages.length} pages, ${faults.length} faults`);
process.exitCode = faults.length ? 1 : 0;
