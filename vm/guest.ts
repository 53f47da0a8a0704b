/** Inside the machine: probes as `auto` does, and where they are content, the short form of the integrity suite. */
import {spawnSync} from 'node:child_process';
import {fileURLToPath} from 'node:url';
import {probeAcceleration} from '../src/loader/acceleration-probe.js';

const INTEGRITY = fileURLToPath(new URL('../test/accelerate/full.js', import.meta.url));

const {oneQueue, findings} = probeAcceleration();
console.log(JSON.stringify({oneQueue: oneQueue ?? null, findings}));
if (oneQueue !== undefined || process.argv.includes('--anyway')) {
	const {status} = spawnSync(process.execPath, [INTEGRITY, '--streams', '300', '--bytes', '64M', '--max-bytes', '4M', '--lanes', '32', '--hung', '60', '--recipe-rounds', '10', '--duplex', '16M'], {stdio: 'inherit'});
	process.exitCode = status ?? 1;
}
