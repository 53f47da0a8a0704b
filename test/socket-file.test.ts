import {existsSync, mkdtempSync, renameSync, rmSync, writeFileSync} from 'node:fs';
import {tmpdir} from 'node:os';
import path from 'node:path';
import {setTimeout as sleep} from 'node:timers/promises';
import test, {type ExecutionContext} from 'ava';
import {SocketFile} from '../src/socket-file.js';
import {eventually} from './helpers/process.js';

/** Any file will do. */
function lookedAfter(t: ExecutionContext, open: (file: string) => void | Promise<void>) {
	const directory = mkdtempSync(path.join(tmpdir(), 'sidestep-socket-'));
	const file = path.join(directory, 'socket');
	const lines: string[] = [];
	const socketFile = new SocketFile({title: 'the socket', path: file, checkMs: 5, log: line => lines.push(line), open: async () => open(file)});
	t.teardown(() => {
		socketFile.close();
		rmSync(directory, {recursive: true});
	});
	writeFileSync(file, '');
	socketFile.lookAfter();
	return {socketFile, file, lines};
}

test('a problem is said once, and so is its end', async t => {
	let reason = 'one';
	let tries = 0;
	const {socketFile, file, lines} = lookedAfter(t, file => {
		tries++;
		if (reason !== '') {
			throw new Error(reason);
		}

		writeFileSync(file, '');
	});
	await sleep(50);
	t.deepEqual([tries, socketFile.problem], [0, undefined], 'it is there');
	rmSync(file);
	await eventually('tried again and again', () => tries > 3);
	t.is(socketFile.problem, 'one');
	reason = 'another';
	await eventually('another problem', () => socketFile.problem === 'another');
	reason = '';
	await eventually('no problem', () => socketFile.problem === undefined);
	t.deepEqual(lines, ['one', 'another', `the socket ${file} was gone: made again`]);
	const before = tries;
	await sleep(50);
	t.is(tries, before);
});

test('it is not made twice at once, and after close nothing is said', async t => {
	let opens = 0;
	let fail: (error: Error) => void = () => undefined;
	const {socketFile, file, lines} = lookedAfter(t, async () => {
		opens++;
		await new Promise((_resolve, reject) => {
			fail = reject;
		});
	});
	rmSync(file);
	await eventually('it is being made', () => opens === 1);
	await sleep(50);
	t.is(opens, 1);
	socketFile.close();
	fail(new Error('too late'));
	await sleep(50);
	t.deepEqual([opens, lines], [1, []]);
});

test('what somebody else has put there is not removed, what is ours is', t => {
	const {socketFile, file, lines} = lookedAfter(t, () => undefined);
	const aside = `${file}-aside`;
	// Ours lives on, so that the other one cannot have its inode: as with a socket that is listened at.
	renameSync(file, aside);
	writeFileSync(file, '');
	socketFile.remove();
	t.true(existsSync(file));
	renameSync(aside, file);
	socketFile.remove();
	t.false(existsSync(file));
	socketFile.remove();
	t.deepEqual(lines, []);
});
