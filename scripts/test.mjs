// Runs every test and ends in the plain line `N passed, N failed, N skipped`. Reads ava's TAP.
import {spawn} from 'node:child_process';
import {createInterface} from 'node:readline';
import {fileURLToPath} from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const files = process.argv.slice(2);
const total = {passed: 0, failed: 0, skipped: 0};

async function run(title, node, args) {
	console.log(`\n# ${title}`);
	const child = spawn(node, ['node_modules/ava/entrypoints/cli.mjs', '--tap', ...args], {cwd: root, stdio: ['ignore', 'pipe', 'inherit']});
	let bad = false;
	let seen = 0;
	for await (const line of createInterface({input: child.stdout})) {
		const [, not, name, directive] = /^(not )?ok \d+ - (.*?)( # (?:SKIP|TODO))?$/.exec(line) ?? [];
		if (name !== undefined) {
			seen++;
			total[directive ? 'skipped' : not ? 'failed' : 'passed']++;
			bad = not !== undefined;
			console.log(`${directive ? 'skipped' : not ? 'FAILED ' : 'passed '} ${name}`);
		} else if (bad || /^# .*(?:exit|timed out|error)/i.test(line)) {
			console.log(line);
		}
	}

	const code = child.exitCode ?? await new Promise(resolve => {
		child.once('close', resolve);
	});
	// A test file that crashed, or that held no test, is a failure too.
	if ((code !== 0 && total.failed === 0) || seen === 0) {
		total.failed++;
		console.log(`FAILED  ${title}: ava ended with ${code} after ${seen} tests`);
	}
}

const started = Date.now();
await run(`Node ${process.versions.node}`, process.execPath, files);
if (files.length === 0) {
	for (const major of [22, 24]) {
		await run(`the addon on Node ${major}`, `${root}/.cache/node${major}/node_modules/node-linux-${process.arch}/bin/node`, ['dist/test/native/*.kernel.js']);
	}
}

console.log(`\n${((Date.now() - started) / 1000).toFixed(0)} s`);
console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
process.exit(total.failed === 0 ? 0 : 1);
